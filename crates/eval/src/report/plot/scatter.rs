//! Plots the cells chosen against the fewest that reach the target.

use plotters::prelude::*;

use super::{
    Area, Axis, DASH, Drawn, GREY, INK, Key, Labels, Look, Palette, Panel, WIDTH, chart, dashed, hollow, key, marker,
    svg,
};
use crate::report::table::target;
use crate::report::{AdaptivityTable, FULL};

/// Height in pixels that makes the plotting area approximately square.
const HEIGHT: u32 = 400;

/// Plots C against C* in percent of the prompt's cells, with a point for each request. Prompts of all lengths share the
/// axes.
pub fn panel(table: &AdaptivityTable, palette: Palette) -> Panel {
    let axis = Axis::linear(0.0, 100.0);
    let (low, high) = axis.ends();
    let labels = Labels { x: "cells needed for the target, C*, in %", y: "cells kept, C, in %", left: 64 };
    let draw = |area: &Area| -> Drawn {
        let mut chart = chart(area, axis.clone(), axis, &labels)?;
        chart.draw_series([dashed([(low, low), (high, high)], DASH, GREY.stroke_width(2))])?;
        for p in &table.points {
            let at = (100.0 * p.oracle, 100.0 * p.share);
            let look = palette.look(&p.config);
            let point = if p.missed { hollow(at, look) } else { marker(at, look) };
            chart.plotting_area().draw(&point)?;
        }
        Ok(())
    };
    Panel::new(&format!("KL at most {}", target(table.target)), &table.place, svg((WIDTH, HEIGHT), draw))
}

/// Returns the legend.
pub fn keys<'a>(shown: impl Iterator<Item = &'a str> + Clone, palette: Palette) -> Vec<Key> {
    let diagonal = key("C = C*", |area| area.draw(&dashed([(4, 15), (20, 1)], DASH, GREY.stroke_width(2))));
    let missed = key("target missed", |area| area.draw(&hollow((12, 8), Look { colour: INK, ..palette.look(FULL) })));
    [palette.keys(shown), vec![missed, diagonal]].concat()
}
