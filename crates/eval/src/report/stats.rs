//! Statistics for the tables.

pub use crate::metrics::{mean, quantile};

/// Sample standard deviation (n - 1); None for fewer than two values.
pub fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

/// Standard error of the mean: deviation / sqrt(n); None for fewer than two values.
pub fn standard_error(values: &[f64]) -> Option<f64> {
    deviation(values).map(|sd| sd / (values.len() as f64).sqrt())
}

/// Spearman's rank correlation, -1 to 1; equal values share their mean rank. None if all values of one side are equal.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let (a, b) = (ranks(a), ranks(b));
    let middle = mean(&a);
    let products = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - middle) * (b - middle)).sum::<f64>();
    let spread = (products(&a, &a) * products(&b, &b)).sqrt();
    (spread > 0.0).then(|| products(&a, &b) / spread)
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let count = |is: fn(&f64, &f64) -> bool, value| values.iter().filter(|other| is(other, value)).count() as f64;
    values.iter().map(|value| count(f64::lt, value) + (count(f64::eq, value) + 1.0) / 2.0).collect()
}

/// Splits items by a key, in the order in which the keys first appear.
pub fn group_by<T, K: PartialEq>(items: impl IntoIterator<Item = T>, key: impl Fn(&T) -> K) -> Vec<(K, Vec<T>)> {
    let mut groups: Vec<(K, Vec<T>)> = Vec::new();
    for item in items {
        let key = key(&item);
        match groups.iter_mut().find(|(known, _)| *known == key) {
            Some((_, group)) => group.push(item),
            None => groups.push((key, vec![item])),
        }
    }
    groups
}

/// Splits a name into pieces of text, each with the number after it. Sorts `ruler/4096` before `ruler/16384`, and
/// `500 words` before `1000 words`.
pub fn natural(name: &str) -> Vec<(&str, u64)> {
    let mut pieces = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let (text, after) = rest.split_at(rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len()));
        let (number, after) = after.split_at(after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len()));
        pieces.push((text, number.parse().unwrap_or(0)));
        rest = after;
    }
    pieces
}
