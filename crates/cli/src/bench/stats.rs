//! Means and medians of a few repetitions.

pub use gvote_eval::metrics::mean;
use gvote_eval::metrics::quantile;

/// Returns the sample standard deviation (with n - 1); 0 for a single value, as in llama-bench.
pub fn deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = mean(values);
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

/// Returns the middle value, or the mean of the two middle ones.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviation_is_that_of_a_sample() {
        assert_eq!(deviation(&[2.0, 4.0]), 2_f64.sqrt());
        assert_eq!(deviation(&[7.0]), 0.0);
    }

    #[test]
    fn the_median_ignores_the_order() {
        assert_eq!(median(&[3.0, 1.0, 9.0]), 3.0);
        assert_eq!(median(&[4.0, 1.0, 9.0, 2.0]), 3.0);
    }
}
