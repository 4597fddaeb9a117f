//! Bar plots of the scores of single tasks.

use plotters::prelude::*;

use super::{Area, Axis, Drawn, INK, Key, LETTER, Labels, Look, Palette, Panel, WIDTH, chart, svg};
use crate::report::TaskTable;

/// Height of a bar with few and with many bars for each task, the limit between them, the gap between two tasks, and
/// the space above and below the bars; in pixels, except for the limit.
const BARS: [u32; 2] = [9, 6];
const FEW: usize = 6;
const GAP: u32 = 10;
const FRAME: u32 = 60;
/// Maximum number of letters in a task's name.
const LONGEST_NAME: usize = 20;
/// Minimum length of a bar in percent: a score of 0 remains visible, unlike a missing score.
const SLIVER: f64 = 1.0;

/// Plots the tasks of a suite from top to bottom, each with the configurations in the order of the table.
pub fn panel(table: &TaskTable, palette: Palette) -> Panel {
    let names: Vec<String> = table.tasks.iter().map(|task| shorten(task)).collect();
    let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as u32;
    let bar_height = BARS[usize::from(table.rows.len() > FEW)];
    let labels = Labels { x: "score, %", y: "", left: LETTER * longest + 12 };
    let height = FRAME + names.len() as u32 * (bar_height * table.rows.len() as u32 + GAP);
    let (x, y) = (Axis::linear(0.0, 100.0), Axis::names(names).reversed());
    let draw = |area: &Area| -> Drawn {
        let mut chart = chart(area, x, y, &labels)?;
        let gap = f64::from(GAP) / f64::from(bar_height * table.rows.len() as u32 + GAP);
        let bar = (1.0 - gap) / table.rows.len() as f64;
        for (place, row) in table.rows.iter().enumerate() {
            let look = palette.look(&row.config);
            for (task, score) in row.scores.iter().enumerate() {
                let Some(score) = score else { continue };
                let y = task as f64 + gap / 2.0 + place as f64 * bar;
                let end = 100.0 * score.mean;
                bars([(0.0, y), (end.max(SLIVER), y + bar)], look)
                    .into_iter()
                    .try_for_each(|b| chart.plotting_area().draw(&b))?;
                if let Some(error) = score.standard_error.map(|e| 100.0 * e).filter(|e| *e > 0.0) {
                    let middle = y + bar / 2.0;
                    let line = vec![(end - error, middle), (end + error, middle)];
                    chart.draw_series([PathElement::new(line, INK.stroke_width(1))])?;
                }
            }
        }
        Ok(())
    };
    Panel::new(&table.suite, &table.place, svg((WIDTH, height), draw))
}

/// Returns the configurations with samples of their bars.
pub fn keys<'a>(shown: impl Iterator<Item = &'a str> + Clone, palette: Palette) -> Vec<Key> {
    palette.keys_with(shown, |area, look| bars([(4, 4), (20, 12)], look).into_iter().try_for_each(|b| area.draw(&b)))
}

/// Returns a bar and its border.
fn bars<C: Copy>(corners: [C; 2], look: Look) -> [Rectangle<C>; 2] {
    [
        Rectangle::new(corners, look.colour.mix(look.opacity).filled()),
        Rectangle::new(corners, look.colour.stroke_width(1)),
    ]
}

fn shorten(name: &str) -> String {
    if name.chars().count() <= LONGEST_NAME {
        return name.to_owned();
    }
    name.chars().take(LONGEST_NAME - 1).chain(['…']).collect()
}
