//! Heat maps of the needle's scores: depth by length.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Axis, Chart, Drawn, FONT, Labels, Palette, Panel, WIDTH, chart, svg};
use crate::report::{Needle, NeedleMap, TaskTable};

/// Height of a row of the map, and of the space above and below the rows, in pixels.
const ROW: u32 = 26;
const FRAME: u32 = 60;
/// Gap between two fields, in pixels.
const GAP: u32 = 1;
const ON_LIGHT: RGBColor = RGBColor(0x11, 0x11, 0x11);
const ON_DARK: RGBColor = RGBColor(0xFF, 0xFF, 0xFF);

/// Returns a map for each configuration of each table, grouped by configuration.
pub fn panels(tables: &[TaskTable], palette: Palette) -> Vec<Panel> {
    let maps = tables.iter().filter_map(|table| table.needle.as_ref().map(|needle| (table, needle)));
    let mut maps: Vec<_> =
        maps.flat_map(|(table, needle)| needle.maps.iter().map(move |m| (table, needle, m))).collect();
    maps.sort_by_key(|(_, _, map)| palette.0.iter().position(|config| config.name == map.config));
    let name = |table: &TaskTable, map: &NeedleMap| format!("{}: {}", table.suite, map.config);
    maps.into_iter().map(|(table, n, map)| Panel::new(&name(table, map), &table.place, draw(n, map))).collect()
}

/// Returns the colours of the scores 0 to 1, evenly spaced, for the legend.
pub fn ramp() -> Vec<String> {
    const STOPS: u8 = 7;
    let colours = (0..=STOPS).map(|i| ViridisRGB::get_color(f64::from(i) / f64::from(STOPS)));
    colours.map(|RGBColor(r, g, b)| format!("rgb({r}, {g}, {b})")).collect()
}

fn draw(needle: &Needle, map: &NeedleMap) -> String {
    let x = Axis::names(needle.lengths.iter().cloned());
    let y = Axis::names(needle.depths.iter().map(|depth| format!("{depth} %"))).reversed();
    let labels = Labels { x: "length of the context", y: "depth of the needle", left: 72 };
    svg((WIDTH, FRAME + ROW * needle.depths.len() as u32), |area| {
        let chart = chart(area, x, y, &labels)?;
        for (row, scores) in map.scores.iter().enumerate() {
            for (column, score) in scores.iter().enumerate() {
                score.map_or(Ok(()), |score| field(&chart, (column as f64, row as f64), score))?;
            }
        }
        Ok(())
    })
}

/// Draws a coloured field with its score in percent.
fn field(chart: &Chart, (x, y): (f64, f64), score: f64) -> Drawn {
    let colour = ViridisRGB::get_color(score.clamp(0.0, 1.0));
    let mut ground = Rectangle::new([(x, y), (x + 1.0, y + 1.0)], colour.filled());
    ground.set_margin(GAP, GAP, GAP, GAP);
    chart.plotting_area().draw(&ground)?;
    let letters = FONT.into_font().color(if is_light(colour) { &ON_LIGHT } else { &ON_DARK });
    let letters = letters.pos(Pos::new(HPos::Center, VPos::Center));
    chart.plotting_area().draw(&Text::new(format!("{:.0}", 100.0 * score), (x + 0.5, y + 0.5), letters))
}

/// Returns true if dark letters are legible on a colour: its luma (ITU-R BT.601) is above the middle.
fn is_light(RGBColor(r, g, b): RGBColor) -> bool {
    0.299 * f64::from(r) + 0.587 * f64::from(g) + 0.114 * f64::from(b) > 127.5
}
