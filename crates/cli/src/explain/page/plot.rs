//! The plots of an explanation.

use gvote::explain::Explanation;
use gvote::policy::HeadOpinion;
use plotters::prelude::*;
use serde::Serialize;

use gvote_eval::plot::{Axis, COLOURS, Chart, DASH, Drawn, GREY, INK, Key, Labels, WIDTH, chart, dashed, key, svg};

const HEIGHT: u32 = 280;
/// What is chosen, and what belongs to it.
const CHOSEN: RGBColor = COLOURS[0];
const REFUSED: RGBColor = COLOURS[1];
const RADIUS: i32 = 5;
/// The smallest KL that the axis of a trial shows, as a share of the bar: what is below lies on the edge.
const LEAST_KL: f64 = 0.1;
/// Layers between two names on an axis, at least so many that the names do not touch.
const MOST_NAMES: usize = 10;
/// Who would have kept it: both, real, synthetic queries, neither.
const AGREEMENT: [(&str, RGBColor); 4] = [
    ("both", COLOURS[0]),
    ("real queries", COLOURS[5]),
    ("synthetic queries", COLOURS[2]),
    ("neither: what stands around, and other heads' choice", RGBColor(0xB0, 0xB0, 0xB0)),
];
/// Of a layer's place, what its bar covers.
const BAR: f64 = 0.8;

/// A plot, what its marks mean, and what it says.
#[derive(Debug, Clone, Serialize)]
pub struct Panel {
    pub title: &'static str,
    pub svg: String,
    pub keys: Vec<Key>,
    pub caption: String,
}

/// What a trial measured.
pub fn trial(explanation: &Explanation, caption: String) -> Option<Panel> {
    let (report, bar) = (&explanation.report, f64::from(explanation.bar?));
    let most = report.tried.iter().map(|(_, kl)| f64::from(*kl)).fold(2.0 * bar, f64::max);
    let least = LEAST_KL * bar;
    let (x, y) = (Axis::linear(0.0, report.cells_before as f64), Axis::log(least, most));
    let drawing = svg((WIDTH, HEIGHT), |area| {
        let mut chart = chart(area, x, y, &Labels { x: "cells", y: "KL, nats a token", left: 64 })?;
        let end = report.cells_before as f64;
        chart.draw_series([dashed([(0.0, bar), (end, bar)], DASH, GREY.stroke_width(2))])?;
        chosen_line(&mut chart, report.cells_after)?;
        report.tried.iter().try_for_each(|&(cells, kl)| {
            let (at, fits) = ((cells as f64, f64::from(kl).max(least)), f64::from(kl) <= bar);
            chart.plotting_area().draw(&if fits { fitting(at) } else { refused(at) })
        })
    });
    let keys = vec![
        key("close enough", |area| area.draw(&fitting((12, 8)))),
        key("too far off (at least this far)", |area| area.draw(&refused((12, 8)))),
        key("the bar", |area| area.draw(&dashed([(0, 8), (24, 8)], DASH, GREY.stroke_width(2)))),
        chosen_key(),
    ];
    Some(Panel { title: "What the trial measured", svg: drawing, keys, caption })
}

/// The share of the attention that each number of cells gives up.
pub fn lost_mass(explanation: &Explanation, caption: String) -> Option<Panel> {
    let n = explanation.curve.len().checked_sub(1)?;
    let policy = &explanation.policy;
    // fewer never come into question
    let first = (policy.sinks + policy.recent).min(n);
    let step = (n - first).div_ceil(WIDTH as usize).max(1);
    let point = |count: usize| (count as f64, 100.0 * explanation.curve[count]);
    let points: Vec<_> = (first..n).step_by(step).chain([n]).map(point).collect();
    let (x, y) = (Axis::linear(0.0, n as f64), Axis::linear(0.0, points[0].1));
    let drawing = svg((WIDTH, HEIGHT), |area| {
        let mut chart = chart(area, x, y, &Labels { x: "cells", y: "attention given up, %", left: 64 })?;
        chart.draw_series(LineSeries::new(points, INK.stroke_width(2)))?;
        let chosen = explanation.report.cells_after;
        chosen_line(&mut chart, chosen)?;
        chart.plotting_area().draw(&fitting(point(chosen.min(n))))
    });
    Some(Panel { title: "What fewer cells give up", svg: drawing, keys: vec![chosen_key()], caption })
}

/// The cells that each head would need by itself.
pub fn needs(explanation: &Explanation, caption: String) -> Option<Panel> {
    let need = |head: &HeadOpinion| head.needs.map(f64::from);
    let all = explanation.heads.iter().map(need).collect::<Option<Vec<f64>>>().filter(|all| !all.is_empty())?;
    let y = Axis::linear(0.0, explanation.report.cells_before as f64);
    let drawing = svg((WIDTH, HEIGHT), |area| {
        let mut chart = chart(area, layers(explanation), y, &Labels { x: "layer", y: "cells", left: 64 })?;
        let chosen = explanation.report.cells_after as f64;
        let end = explanation.layers.len() as f64;
        chart.draw_series([dashed([(0.0, chosen), (end, chosen)], DASH, CHOSEN.stroke_width(2))])?;
        for (layer, heads) in all.chunks(explanation.n_head_kv).enumerate() {
            let x = layer as f64 + 0.5;
            for &head in heads {
                chart.plotting_area().draw(&Circle::new((x, head), 2, GREY.filled()))?;
            }
            let mean = heads.iter().sum::<f64>() / heads.len() as f64;
            let line = vec![(x - BAR / 2.0, mean), (x + BAR / 2.0, mean)];
            chart.plotting_area().draw(&PathElement::new(line, INK.stroke_width(2)))?;
        }
        Ok(())
    });
    let keys = vec![
        key("what every head holds", |area| area.draw(&dashed([(0, 8), (24, 8)], DASH, CHOSEN.stroke_width(2)))),
        key("a head would need", |area| area.draw(&Circle::new((12, 8), 2, GREY.filled()))),
        key("mean of the layer", |area| area.draw(&PathElement::new(vec![(4, 8), (20, 8)], INK.stroke_width(2)))),
    ];
    Some(Panel { title: "Cells by layer", svg: drawing, keys, caption })
}

/// Attention that each head gives up.
pub fn lost_by_layer(explanation: &Explanation, caption: String) -> Option<Panel> {
    let lost: Vec<f64> = explanation.heads.iter().map(|head| 100.0 * f64::from(head.lost_mass)).collect();
    let most = lost.iter().copied().fold(0.0, f64::max);
    let y = Axis::linear(0.0, if most > 0.0 { most } else { return None });
    let drawing = svg((WIDTH, HEIGHT), |area| {
        let labels = Labels { x: "layer", y: "attention given up, %", left: 64 };
        let chart = chart(area, layers(explanation), y, &labels)?;
        for (layer, heads) in lost.chunks(explanation.n_head_kv).enumerate() {
            let x = layer as f64 + 0.5;
            let mean = heads.iter().sum::<f64>() / heads.len() as f64;
            bar(&chart, x, (0.0, mean), CHOSEN)?;
            for &head in heads {
                chart.plotting_area().draw(&Circle::new((x, head), 2, GREY.filled()))?;
            }
        }
        Ok(())
    });
    let keys = vec![
        key("mean of the layer", |area| area.draw(&Rectangle::new([(4, 4), (20, 12)], CHOSEN.filled()))),
        key("a head", |area| area.draw(&Circle::new((12, 8), 2, GREY.filled()))),
    ];
    Some(Panel { title: "Attention given up by layer", svg: drawing, keys, caption })
}

/// Which queries would have kept what was kept.
pub fn agreement(explanation: &Explanation, caption: String) -> Option<Panel> {
    let all = explanation.heads.iter().map(|head| head.agreement).collect::<Option<Vec<_>>>()?;
    if all.is_empty() {
        return None;
    }
    let y = Axis::linear(0.0, 100.0);
    let drawing = svg((WIDTH, HEIGHT), |area| {
        let labels = Labels { x: "layer", y: "of what is kept, %", left: 64 };
        let chart = chart(area, layers(explanation), y, &labels)?;
        for (layer, heads) in all.chunks(explanation.n_head_kv).enumerate() {
            let sum = heads
                .iter()
                .fold([0; 4], |sum, a| [sum[0] + a.both, sum[1] + a.real, sum[2] + a.synthetic, sum[3] + a.neither]);
            let whole = f64::from(sum.iter().sum::<u32>().max(1));
            let mut low = 0.0;
            for (count, (_, colour)) in sum.into_iter().zip(AGREEMENT) {
                let high = low + 100.0 * f64::from(count) / whole;
                bar(&chart, layer as f64 + 0.5, (low, high), colour)?;
                low = high;
            }
        }
        Ok(())
    });
    let keys = AGREEMENT
        .map(|(name, colour)| key(name, |area| area.draw(&Rectangle::new([(4, 4), (20, 12)], colour.filled()))));
    Some(Panel { title: "Real and synthetic queries", svg: drawing, keys: keys.into(), caption })
}

/// One place a layer, some of them named.
fn layers(explanation: &Explanation) -> Axis {
    let step =
        [1, 2, 5, 10, 20, 50].into_iter().find(|step| explanation.layers.len() <= step * MOST_NAMES).unwrap_or(100);
    let name = |(place, layer): (usize, &i32)| if place % step == 0 { layer.to_string() } else { String::new() };
    Axis::names(explanation.layers.iter().enumerate().map(name))
}

fn bar(chart: &Chart, x: f64, (low, high): (f64, f64), colour: RGBColor) -> Drawn {
    let corners = [(x - BAR / 2.0, low), (x + BAR / 2.0, high)];
    chart.plotting_area().draw(&Rectangle::new(corners, colour.filled()))
}

fn chosen_line(chart: &mut Chart, chosen: usize) -> Drawn {
    let (low, high) = chart.as_coord_spec().y_spec().ends();
    let x = chosen as f64;
    chart.draw_series([PathElement::new(vec![(x, low), (x, high)], CHOSEN.stroke_width(1))]).map(drop)
}

fn chosen_key() -> Key {
    key("chosen", |area| area.draw(&PathElement::new(vec![(12, 0), (12, 16)], CHOSEN.stroke_width(1))))
}

fn fitting<C: Clone>(at: C) -> Circle<C, i32> {
    Circle::new(at, RADIUS, CHOSEN.filled())
}

fn refused<C: Clone>(at: C) -> Circle<C, i32> {
    Circle::new(at, RADIUS - 1, REFUSED.stroke_width(2))
}
