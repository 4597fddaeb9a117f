//! The plots of a report.

pub mod bars;
pub mod heat;
pub mod pareto;
pub mod scatter;

use plotters::prelude::*;
use serde::Serialize;

use super::{Config, FULL, Place};
use crate::plot::{
    Area, Axis, COLOURS, Chart, DASH, Drawn, FONT, GREY, INK, Key, LETTER, Labels, Svg, WIDTH, chart, dashed, key, svg,
};
use gvote::policy::Kind;

/// One plot of a figure.
#[derive(Debug, Clone, Serialize)]
pub struct Panel {
    pub title: String,
    /// Model and cache type of its records.
    pub place: String,
    pub svg: String,
}

impl Panel {
    fn new(about: &str, place: &Place, svg: String) -> Self {
        Self { title: format!("{about}, {}", place.sight()), place: place.of_model(), svg }
    }
}

/// Appearance of a configuration in every plot.
#[derive(Debug, Clone, Copy)]
struct Look {
    colour: RGBColor,
    /// Corners of the marker; empty for a circle.
    corners: &'static [(i32, i32)],
    /// Opacity of a bar: full, or reduced so that the border stands out.
    opacity: f64,
}

/// Markers for the first seven configurations, the next seven, and the rest.
const MARKERS: [&[(i32, i32)]; 3] = [&[], &[(-4, -4), (4, -4), (4, 4), (-4, 4)], &[(0, -6), (6, 5), (-6, 5)]];
const RADIUS: i32 = 5;
/// Opacities of bars, for the same groups of configurations.
const OPACITIES: [f64; 3] = [1.0, 0.35, 0.0];

/// Appearance of all configurations of a report.
#[derive(Clone, Copy)]
pub struct Palette<'a>(pub &'a [Config]);

impl Palette<'_> {
    fn look(&self, config: &str) -> Look {
        let coloured = self.0.iter().filter(|c| c.name != FULL);
        match coloured.map(|c| &c.name).position(|name| name == config) {
            Some(i) => {
                let round = (i / COLOURS.len()) % MARKERS.len();
                Look { colour: COLOURS[i % COLOURS.len()], corners: MARKERS[round], opacity: OPACITIES[round] }
            }
            None => Look { colour: GREY, corners: MARKERS[0], opacity: OPACITIES[0] },
        }
    }

    /// Returns the policy whose line a configuration lies on. None for configurations that no cache can hold.
    fn policy(&self, config: &str) -> Option<Kind> {
        self.0.iter().find(|c| c.name == config && !c.exact).map(|c| c.policy)
    }

    /// Returns the configurations among `shown`, in the order of the report, with their markers.
    pub fn keys<'b>(&self, shown: impl Iterator<Item = &'b str> + Clone) -> Vec<Key> {
        self.keys_with(shown, |area, look| area.draw(&marker((12, 8), look)))
    }

    fn keys_with<'b>(
        &self,
        shown: impl Iterator<Item = &'b str> + Clone,
        draw: impl Fn(&Area, Look) -> Drawn,
    ) -> Vec<Key> {
        let configs = self.0.iter().filter(|c| shown.clone().any(|name| name == c.name));
        configs.map(|c| key(&c.name, |area| draw(area, self.look(&c.name)))).collect()
    }
}

fn marker<'a, C: Clone + 'a>(at: C, look: Look) -> DynElement<'a, Svg<'a>, C> {
    let style = look.colour.filled();
    if look.corners.is_empty() {
        Circle::new(at, RADIUS, style).into_dyn()
    } else {
        (EmptyElement::at(at) + Polygon::new(look.corners.to_vec(), style)).into_dyn()
    }
}

/// Returns the outline of a marker.
fn hollow<'a, C: Clone + 'a>(at: C, look: Look) -> DynElement<'a, Svg<'a>, C> {
    let style = look.colour.stroke_width(1);
    let Some(first) = look.corners.first() else { return Circle::new(at, RADIUS - 1, style).into_dyn() };
    (EmptyElement::at(at) + PathElement::new([look.corners, &[*first]].concat(), style)).into_dyn()
}
