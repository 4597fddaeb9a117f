//! Shared parts of all plots: SVG narrow enough for a phone, colours, and axes.
//!
//! Text and axes are drawn in [`INK`] and [`GRID`], which the style sheet of [`crate::page`] replaces in dark mode; all
//! other colours are legible on both backgrounds.

mod axis;

use std::{array, io};

use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use serde::Serialize;

pub use self::axis::Axis;

/// Width of a plot in pixels.
pub const WIDTH: u32 = 420;
/// Colour of text and axes; replaced in dark mode.
pub const INK: RGBColor = RGBColor(0, 0, 0);
/// Colour of grid lines; replaced in dark mode.
pub const GRID: RGBColor = RGBColor(0xDD, 0xDD, 0xDD);
/// Colour of the full cache and of lines that join points.
pub const GREY: RGBColor = RGBColor(0x80, 0x80, 0x80);
/// Colours that colour-blind readers can distinguish: Okabe and Ito, "Color Universal Design", 2008, without black, and
/// with olive instead of yellow, which is hard to see on white.
pub const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0x56, 0xB4, 0xE9),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x99, 0x99, 0x33),
];
/// Font and line height. Plotters measures the height of a line, not of its letters, which are 12 pixels on the page.
pub const FONT: (&str, i32) = ("sans-serif", 15);
/// Mean width of a letter of [`FONT`] in pixels.
pub const LETTER: u32 = 7;
/// Dash and gap of the line of the full cache, in pixels.
pub const DASH: (i32, i32) = (6, 4);

pub type Svg<'a> = SVGBackend<'a>;
pub type Area<'a> = DrawingArea<Svg<'a>, Shift>;
pub type Chart<'a, 'b> = ChartContext<'a, Svg<'b>, Cartesian2d<Axis, Axis>>;
pub type Dashed<C> = DashedPathElement<array::IntoIter<C, 2>, i32>;
pub type DrawError = DrawingAreaErrorKind<io::Error>;
pub type Drawn = Result<(), DrawError>;

/// Draws an image with this width and height in pixels.
pub fn svg(size: (u32, u32), draw: impl FnOnce(&Area) -> Drawn) -> String {
    let mut out = String::new();
    let area = SVGBackend::with_string(&mut out, size).into_drawing_area();
    draw(&area).and_then(|()| area.present()).expect("drawing into a string does not fail");
    drop(area);
    out
}

/// One entry of a legend.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Key {
    pub name: String,
    pub svg: String,
}

pub fn key(name: &str, draw: impl FnOnce(&Area) -> Drawn) -> Key {
    Key { name: name.to_owned(), svg: svg((24, 16), draw) }
}

/// A dashed line, in the coordinates of the chart or in pixels.
pub fn dashed<C: Clone>(line: [C; 2], (dash, gap): (i32, i32), style: ShapeStyle) -> Dashed<C> {
    DashedPathElement::new(line, dash, gap, style)
}

/// Labels of the axes.
pub struct Labels<'a> {
    pub x: &'a str,
    pub y: &'a str,
    /// Pixels for the labels of the y axis.
    pub left: u32,
}

/// Draws the axes and returns the area between them.
pub fn chart<'a, 'b>(area: &'a Area<'b>, x: Axis, y: Axis, labels: &Labels) -> Result<Chart<'a, 'b>, DrawError> {
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
