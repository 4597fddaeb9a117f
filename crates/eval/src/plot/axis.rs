//! An axis of a plot, with round numbers at its ends and ticks: linear, logarithmic, or with names.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

/// An axis of numbers or names. Values beyond its ends are drawn at the ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    scale: Scale,
    /// First and last value.
    ends: (f64, f64),
    ticks: Vec<(f64, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scale {
    Linear,
    Log,
    Names,
}

/// Number of intervals that a linear axis aims at.
const INTERVALS: f64 = 5.0;
/// Maximum number of ticks. With more, a logarithmic axis shows decades only.
const MOST_TICKS: usize = 9;

impl Axis {
    /// Creates an axis that covers the values, with ticks at multiples of 1, 2 or 5 times a power of ten.
    pub fn linear(low: f64, high: f64) -> Self {
        let span = if high > low { high - low } else { low.abs().max(1.0) };
        let power = 10_f64.powf((span / INTERVALS).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| *step >= span / INTERVALS);
        let step = step.unwrap_or(10.0 * power);
        // Keeps rounding from pushing a value on a tick to the next one.
        const SLACK: f64 = 1e-9;
        let first = (low / step + SLACK).floor();
        let last = (high / step - SLACK).ceil().max(first + 1.0);
        let count = (last - first) as usize;
        let ticks = (0..=count).map(|i| (first + i as f64) * step).map(|v| (v, number(v, step))).collect();
        Self { scale: Scale::Linear, ends: (first * step, last * step), ticks }
    }

    /// Creates an axis that covers the values, which are above 0, with ticks at 1, 2 and 5 times powers of ten.
    pub fn log(low: f64, high: f64) -> Self {
        let round = |exponent: i32| [1.0, 2.0, 5.0].map(|m| m * 10_f64.powi(exponent));
        let decades = (low.log10().floor() as i32)..=(high.log10().floor() as i32 + 1);
        let all: Vec<f64> = decades.flat_map(round).collect();
        let first = all.iter().rposition(|v| *v <= low).unwrap_or(0);
        let last = all.iter().skip(first + 1).position(|v| *v >= high).map_or(all.len() - 1, |i| first + 1 + i);
        let covered = &all[first..=last];
        let is_decade = |v: f64| (v.log10() - v.log10().round()).abs() < 1e-9;
        let thin = covered.len() > MOST_TICKS;
        let ticks = covered.iter().filter(|v| !thin || is_decade(**v)).map(|v| (*v, number(*v, *v))).collect();
        Self { scale: Scale::Log, ends: (all[first], all[last]), ticks }
    }

    /// Creates an axis with one unit for each name, from 0: the first name lies between 0 and 1.
    pub fn names(names: impl IntoIterator<Item = String>) -> Self {
        let ticks: Vec<_> = names.into_iter().enumerate().map(|(i, name)| (i as f64 + 0.5, name)).collect();
        Self { scale: Scale::Names, ends: (0.0, ticks.len() as f64), ticks }
    }

    /// Reverses the axis: names on a y axis are read from the top.
    pub fn reversed(mut self) -> Self {
        self.ends = (self.ends.1, self.ends.0);
        self
    }

    pub fn is_names(&self) -> bool {
        self.scale == Scale::Names
    }

    pub fn ends(&self) -> (f64, f64) {
        self.ends
    }

    /// Returns the position of a value: 0 at the first end, 1 at the last.
    fn part(&self, value: f64) -> f64 {
        let at = |v: f64| if self.scale == Scale::Log { v.max(f64::MIN_POSITIVE).ln() } else { v };
        let (first, last) = (at(self.ends.0), at(self.ends.1));
        ((at(value) - first) / (last - first)).clamp(0.0, 1.0)
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        from + (self.part(*value) * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.iter().map(|(at, _)| *at).collect()
    }

    fn range(&self) -> Range<f64> {
        self.ends.0..self.ends.1
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        self.ticks.iter().find(|(at, _)| at == value).map_or_else(String::new, |(_, name)| name.clone())
    }
}

/// Formats a multiple of `step` without unnecessary digits; 20000 becomes 20k.
fn number(value: f64, step: f64) -> String {
    const THOUSANDS_FROM: f64 = 10_000.0;
    if value.abs() >= THOUSANDS_FROM && value % 1000.0 == 0.0 {
        return format!("{}k", value / 1000.0);
    }
    let digits = (-step.log10().floor()).max(0.0) as usize;
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, name)| name.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        assert_eq!(labels(&Axis::linear(0.0, 100.0)), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(labels(&Axis::linear(61.3, 64.9)), ["61", "62", "63", "64", "65"]);
        assert_eq!(labels(&Axis::linear(0.0, 0.021)), ["0.000", "0.005", "0.010", "0.015", "0.020", "0.025"]);
        assert_eq!(labels(&Axis::linear(7.0, 7.0)), ["6", "8"]);
        assert_eq!(labels(&Axis::log(150.0, 3000.0)), ["100", "200", "500", "1000", "2000", "5000"]);
        assert_eq!(labels(&Axis::log(0.003, 0.02)), ["0.002", "0.005", "0.01", "0.02"]);
        assert_eq!(labels(&Axis::log(1.0, 100_000.0)), ["1", "10", "100", "1000", "10k", "100k"]);
    }

    #[test]
    fn values_lie_in_proportion() {
        let linear = Axis::linear(0.0, 100.0);
        assert_eq!([0.0, 25.0, 100.0, 170.0].map(|v| linear.map(&v, (10, 210))), [10, 60, 210, 210]);
        let log = Axis::log(1.0, 100.0);
        assert_eq!([1.0, 10.0, 100.0, 0.0].map(|v| log.map(&v, (0, 200))), [0, 100, 200, 0]);
        let names = Axis::names(["a".into(), "b".into()]).reversed();
        assert_eq!([0.5, 1.5].map(|v| names.map(&v, (200, 0))), [50, 150]);
        assert_eq!(names.format_ext(&1.5), "b");
    }
}
