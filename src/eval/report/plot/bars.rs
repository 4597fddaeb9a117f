//! Scores of single tasks.

use plotters::prelude::*;

use super::axis::Axis;
use super::{Area, Drawn, INK, LETTER, Labels, Palette, Panel, chart, svg};
use crate::eval::report::TaskTable;

/// Pixels of a bar, of the gap between two tasks, and of all that is above and below the bars.
const BAR: u32 = 9;
const GAP: u32 = 10;
const FRAME: u32 = 60;
/// Letters of a task's name.
const LONGEST_NAME: usize = 20;
/// Percent: a score of 0 is seen as a sliver, a missing score is not.
const SLIVER: f64 = 1.0;

/// The tasks of a suite from above, and for each the configurations in the order of the table.
pub fn panel(table: &TaskTable, palette: Palette) -> Panel {
    let names: Vec<String> = table.tasks.iter().map(|task| shorten(task)).collect();
    let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as u32;
    let labels = Labels { x: "score, %", y: "", left: LETTER * longest + 12 };
    let height = FRAME + names.len() as u32 * (BAR * table.rows.len() as u32 + GAP);
    let (x, y) = (Axis::linear(0.0, 100.0), Axis::names(names).reversed());
    let draw = |area: &Area| -> Drawn {
        let mut chart = chart(area, x, y, &labels)?;
        let gap = f64::from(GAP) / f64::from(BAR * table.rows.len() as u32 + GAP);
        let bar = (1.0 - gap) / table.rows.len() as f64;
        for (place, row) in table.rows.iter().enumerate() {
            let colour = palette.look(&row.config).colour;
            for (task, score) in row.scores.iter().enumerate() {
                let Some(score) = score else { continue };
                let y = task as f64 + gap / 2.0 + place as f64 * bar;
                let end = 100.0 * score.mean;
                chart.draw_series([Rectangle::new([(0.0, y), (end.max(SLIVER), y + bar)], colour.filled())])?;
                if let Some(error) = score.standard_error.map(|e| 100.0 * e).filter(|e| *e > 0.0) {
                    let middle = y + bar / 2.0;
                    let line = vec![(end - error, middle), (end + error, middle)];
                    chart.draw_series([PathElement::new(line, INK.stroke_width(1))])?;
                }
            }
        }
        Ok(())
    };
    Panel::new(&table.suite, &table.place, svg((super::WIDTH, height), draw))
}

fn shorten(name: &str) -> String {
    if name.chars().count() <= LONGEST_NAME {
        return name.to_owned();
    }
    name.chars().take(LONGEST_NAME - 1).chain(['…']).collect()
}
