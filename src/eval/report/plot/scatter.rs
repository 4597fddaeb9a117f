//! Cells chosen against the fewest that would have done.

use plotters::prelude::*;

use super::axis::Axis;
use super::{Area, DASH, Drawn, GREY, INK, Key, Labels, Palette, Panel, chart, dashed, key, marker, svg};
use crate::eval::report::AdaptivityTable;

/// The plotting area is about square.
const HEIGHT: u32 = 400;
/// Half the side of a cross, in pixels.
const CROSS: i32 = 4;

/// C over C*, a point a request.
pub fn panel(table: &AdaptivityTable, palette: Palette) -> Panel {
    let cells = || table.points.iter().flat_map(|p| [p.cells, p.oracle]).map(|n| n.max(1) as f64);
    let axis = Axis::log(cells().fold(f64::MAX, f64::min), cells().fold(1.0, f64::max));
    let (low, high) = axis.ends();
    let labels = Labels { x: "fewest cells that reach the target, C*", y: "cells chosen, C", left: 64 };
    let draw = |area: &Area| -> Drawn {
        let mut chart = chart(area, axis.clone(), axis, &labels)?;
        chart.draw_series([dashed([(low, low), (high, high)], DASH, GREY.stroke_width(2))])?;
        for p in &table.points {
            let at = (p.oracle as f64, p.cells as f64);
            let look = palette.look(&p.config);
            if p.missed {
                chart.draw_series([Cross::new(at, CROSS, look.colour.stroke_width(2))])?;
            } else {
                chart.plotting_area().draw(&marker(at, look))?;
            }
        }
        Ok(())
    };
    Panel::new(&format!("KL at most {}", table.target), &table.place, svg((super::WIDTH, HEIGHT), draw))
}

/// What the plots show.
pub fn keys<'a>(shown: impl Iterator<Item = &'a str> + Clone, palette: Palette) -> Vec<Key> {
    let diagonal = key("C = C*", |area| area.draw(&dashed([(4, 15), (20, 1)], DASH, GREY.stroke_width(2))));
    let missed = key("target missed", |area| area.draw(&Cross::new((12, 8), CROSS, INK.stroke_width(2))));
    [palette.keys(shown), vec![missed, diagonal]].concat()
}
