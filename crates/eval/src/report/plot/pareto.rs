//! Plots of quality against the share of the cells kept.

use plotters::prelude::*;

use super::{Axis, Chart, DASH, Drawn, GREY, Key, Labels, Palette, Panel, WIDTH, chart, dashed, key, marker, svg};
use crate::report::table::tokens;
use crate::report::{FULL, FidelityTable, TaskTable};
use gvote::policy::Kind;

const HEIGHT: u32 = 300;
/// Ratio of the largest to the smallest KL from which the axis is logarithmic.
const LOG_FROM: f64 = 20.0;

/// Top of the axis in nats if no configuration drifts.
const NO_DRIFT: f64 = 0.001;
/// Minimum span of the axis in percent of the score: smaller differences are noise.
const LEAST_SPAN: f64 = 5.0;

/// A configuration: percent of the cells, quality in the unit of the axis, and half the length of its error bar.
#[derive(Clone, Copy)]
struct Point<'a> {
    config: &'a str,
    share: f64,
    value: f64,
    error: f64,
}

/// Plots the mean KL against the share kept.
pub fn fidelity(table: &FidelityTable, palette: Palette) -> Panel {
    let points: Vec<Point> = table
        .rows
        .iter()
        .filter(|r| r.config != FULL)
        .map(|r| Point {
            config: &r.config,
            share: 100.0 * r.share,
            value: r.kl_mean,
            error: r.seed_spread.unwrap_or(0.0),
        })
        .collect();
    let positive = || points.iter().map(|p| p.value).filter(|v| *v > 0.0);
    let (low, high) =
        (positive().fold(f64::MAX, f64::min), Some(top(&points)).filter(|top| *top > 0.0).unwrap_or(NO_DRIFT));
    let logarithmic = high > LOG_FROM * low;
    let y = if logarithmic { Axis::log(low, high) } else { Axis::linear(0.0, high) };
    let full = (!logarithmic).then_some(0.0);
    let about = format!("KL, {} tokens", tokens(table.tokens));
    Panel::new(&about, &table.place, draw(&points, full, y, "mean KL, nats", palette))
}

/// Plots the mean score against the share kept.
pub fn tasks(table: &TaskTable, palette: Palette) -> Panel {
    let percent = |score: f64| 100.0 * score;
    let points: Vec<Point> = table
        .rows
        .iter()
        .filter(|r| r.config != FULL)
        .map(|r| Point {
            config: &r.config,
            share: percent(r.share),
            value: percent(r.mean),
            error: r.standard_error.map_or(0.0, percent),
        })
        .collect();
    let full = table.rows.iter().find(|r| r.config == FULL).map(|r| percent(r.mean));
    let low = points.iter().map(|p| p.value - p.error).chain(full).fold(f64::MAX, f64::min);
    let high = full.unwrap_or(0.0).max(top(&points));
    let y = Axis::linear(low.min(high - LEAST_SPAN).max(0.0), high.min(100.0));
    Panel::new(&table.suite, &table.place, draw(&points, full, y, "mean score, %", palette))
}

/// Returns the legend: the full cache, the configurations' markers, and the lines of the policies.
pub fn keys<'a>(shown: impl Iterator<Item = &'a str> + Clone, palette: Palette) -> Vec<Key> {
    let has_full = shown.clone().any(|config| config == FULL);
    let joined = joined(shown.clone().collect(), palette);
    let mut keys = palette.keys(shown.filter(|config| *config != FULL));
    if has_full {
        keys.insert(0, key(FULL, |area| area.draw(&dashed([(0, 8), (24, 8)], DASH, GREY.stroke_width(2)))));
    }
    keys.extend(joined.into_iter().map(|policy| {
        let line = [(0, 8), (24, 8)];
        key(&format!("policy {policy}"), |area| area.draw(&dashed(line, dots(policy), GREY.stroke_width(1))))
    }));
    keys
}

fn draw(points: &[Point], full: Option<f64>, y: Axis, unit: &str, palette: Palette) -> String {
    let most = points.iter().map(|p| p.share).fold(0.0, f64::max);
    let x = Axis::linear(0.0, most.clamp(1.0, 100.0));
    let labels = Labels { x: "cells kept, %", y: unit, left: 64 };
    svg((WIDTH, HEIGHT), |area| {
        let mut chart = chart(area, x, y, &labels)?;
        draw_full(&mut chart, full)?;
        for policy in joined(points.iter().map(|p| p.config).collect(), palette) {
            draw_line(&mut chart, points, policy, palette)?;
        }
        points.iter().try_for_each(|p| draw_error(&mut chart, p, palette))?;
        points.iter().try_for_each(|p| chart.plotting_area().draw(&marker((p.share, p.value), palette.look(p.config))))
    })
}

fn draw_full(chart: &mut Chart, full: Option<f64>) -> Drawn {
    let Some(value) = full else { return Ok(()) };
    let (from, to) = chart.as_coord_spec().x_spec().ends();
    chart.draw_series([dashed([(from, value), (to, value)], DASH, GREY.stroke_width(2))])?;
    Ok(())
}

/// Draws a line through the configurations of one policy.
fn draw_line(chart: &mut Chart, points: &[Point], policy: Kind, palette: Palette) -> Drawn {
    let mut line: Vec<(f64, f64)> =
        points.iter().filter(|p| palette.policy(p.config) == Some(policy)).map(|p| (p.share, p.value)).collect();
    line.sort_by(|a, b| a.0.total_cmp(&b.0));
    let style = GREY.stroke_width(1);
    match dots(policy) {
        (_, 0) => chart.draw_series(LineSeries::new(line, style)).map(drop),
        (dash, gap) => chart.draw_series(DashedLineSeries::new(line, dash, gap, style)).map(drop),
    }
}

fn draw_error(chart: &mut Chart, p: &Point, palette: Palette) -> Drawn {
    if p.error > 0.0 {
        let bar = vec![(p.share, p.value - p.error), (p.share, p.value + p.error)];
        chart.draw_series([PathElement::new(bar, palette.look(p.config).colour.stroke_width(1))])?;
    }
    Ok(())
}

/// Returns the policies with several of these configurations.
fn joined(configs: Vec<&str>, palette: Palette) -> Vec<Kind> {
    let shown = || palette.0.iter().map(|c| c.name.as_str()).filter(|name| configs.contains(name));
    let count = |policy: Kind| shown().filter(|name| palette.policy(name) == Some(policy)).count();
    Kind::ALL.iter().copied().filter(|policy| *policy != Kind::Full && count(*policy) > 1).collect()
}

/// Returns the dash and gap of a policy's line, in pixels: a solid line, then dots with increasing gaps.
fn dots(policy: Kind) -> (i32, i32) {
    let index = Kind::ALL.iter().position(|kind| *kind == policy).unwrap_or(0) as i32;
    (2, 3 * (index - 1).max(0))
}

fn top(points: &[Point]) -> f64 {
    points.iter().map(|p| p.value + p.error).fold(0.0, f64::max)
}
