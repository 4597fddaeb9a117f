//! Plots as SVG, narrow enough for a phone.
//!
//! Text and axes are drawn in [`INK`] and [`GRID`], which the style sheet of the page replaces in dark mode; every other
//! colour is legible on both grounds.

mod axis;
pub mod bars;
pub mod heat;
pub mod pareto;
pub mod scatter;

use std::{array, io};

use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use serde::Serialize;

use self::axis::Axis;
use super::{Config, FULL, Place};
use crate::policy::Kind;

/// Width of a plot in pixels.
const WIDTH: u32 = 420;
const INK: RGBColor = RGBColor(0, 0, 0);
const GRID: RGBColor = RGBColor(0xDD, 0xDD, 0xDD);
/// The full cache, and what joins points.
const GREY: RGBColor = RGBColor(0x80, 0x80, 0x80);
/// Colours that colour-blind readers can tell apart: Okabe and Ito, "Color Universal Design", 2008, without black, and with
/// olive for their yellow, which is lost on white.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0x56, 0xB4, 0xE9),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x99, 0x99, 0x33),
];
/// Plotters counts the height of a line of text, not of its letters: 12 pixels on the page.
const FONT: (&str, i32) = ("sans-serif", 15);
/// Mean width of a letter of [`FONT`] in pixels.
const LETTER: u32 = 7;
/// Dash and gap of the line of the full cache, in pixels.
const DASH: (i32, i32) = (6, 4);

type Svg<'a> = SVGBackend<'a>;
type Area<'a> = DrawingArea<Svg<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, Svg<'b>, Cartesian2d<Axis, Axis>>;
type Dashed<C> = DashedPathElement<array::IntoIter<C, 2>, i32>;
type DrawError = DrawingAreaErrorKind<io::Error>;
type Drawn = Result<(), DrawError>;

/// One plot of a figure.
#[derive(Debug, Clone, Serialize)]
pub struct Panel {
    pub title: String,
    /// What its records share.
    pub place: String,
    pub svg: String,
}

impl Panel {
    fn new(about: &str, place: &Place, svg: String) -> Self {
        Self { title: format!("{about}, {}", place.sight()), place: place.of_model(), svg }
    }
}

/// One entry of a legend.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Key {
    pub name: String,
    pub svg: String,
}

/// How a configuration looks in every plot.
#[derive(Debug, Clone, Copy)]
struct Look {
    colour: RGBColor,
    /// Corners of the marker: none for a circle.
    corners: &'static [(i32, i32)],
    /// How opaque a bar is: full, or so that its border stands out.
    opacity: f64,
}

/// Markers for the first seven configurations, the next seven, and the rest.
const MARKERS: [&[(i32, i32)]; 3] = [&[], &[(-4, -4), (4, -4), (4, 4), (-4, 4)], &[(0, -6), (6, 5), (-6, 5)]];
const RADIUS: i32 = 5;
/// The same for bars.
const OPACITIES: [f64; 3] = [1.0, 0.35, 0.0];

/// The looks of all configurations of a report.
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

    /// The policy whose line a configuration lies on. What no cache can hold lies on none.
    fn policy(&self, config: &str) -> Option<Kind> {
        self.0.iter().find(|c| c.name == config && !c.exact).map(|c| c.policy)
    }

    /// Configurations among `shown`, in the order of the report, with their markers.
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

fn key(name: &str, draw: impl FnOnce(&Area) -> Drawn) -> Key {
    Key { name: name.to_owned(), svg: svg((24, 16), draw) }
}

fn svg(size: (u32, u32), draw: impl FnOnce(&Area) -> Drawn) -> String {
    let mut out = String::new();
    let area = SVGBackend::with_string(&mut out, size).into_drawing_area();
    draw(&area).and_then(|()| area.present()).expect("drawing into a string does not fail");
    drop(area);
    out
}

fn marker<'a, C: Clone + 'a>(at: C, look: Look) -> DynElement<'a, Svg<'a>, C> {
    let style = look.colour.filled();
    if look.corners.is_empty() {
        Circle::new(at, RADIUS, style).into_dyn()
    } else {
        (EmptyElement::at(at) + Polygon::new(look.corners.to_vec(), style)).into_dyn()
    }
}

/// The outline of a marker.
fn hollow<'a, C: Clone + 'a>(at: C, look: Look) -> DynElement<'a, Svg<'a>, C> {
    let style = look.colour.stroke_width(1);
    let Some(first) = look.corners.first() else { return Circle::new(at, RADIUS - 1, style).into_dyn() };
    (EmptyElement::at(at) + PathElement::new([look.corners, &[*first]].concat(), style)).into_dyn()
}

/// A line of dashes, in the coordinates of the chart or in pixels.
fn dashed<C: Clone>(line: [C; 2], (dash, gap): (i32, i32), style: ShapeStyle) -> Dashed<C> {
    DashedPathElement::new(line, dash, gap, style)
}

/// Words beside the axes.
struct Labels<'a> {
    x: &'a str,
    y: &'a str,
    /// Pixels for the labels of the y axis.
    left: u32,
}

fn chart<'a, 'b>(area: &'a Area<'b>, x: Axis, y: Axis, labels: &Labels) -> Result<Chart<'a, 'b>, DrawError> {
    let (bare_x, bare_y) = (x.is_names(), y.is_names());
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_right(16)
        .x_label_area_size(if labels.x.is_empty() { 24 } else { 40 })
        .y_label_area_size(labels.left)
        .build_cartesian_2d(x, y)?;
    let mut mesh = chart.configure_mesh();
    if bare_x {
        mesh.disable_x_mesh();
    }
    if bare_y {
        mesh.disable_y_mesh();
    }
    mesh.bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(FONT.into_font().color(&INK))
        .set_all_tick_mark_size(4)
        .x_desc(labels.x)
        .y_desc(labels.y)
        .draw()?;
    Ok(chart)
}
