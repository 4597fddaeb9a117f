//! Search for the fewest cells that reach a target.

/// Steps of the grid for each halving of the cells: neighbours always differ by 9 %.
const STEPS: f64 = 8.0;
/// Steps of the grid between measurements on the way down.
const STRIDE: usize = 4;

/// Returns the counts of cells to choose from, from all `n` down to the `least` that always stay.
pub fn grid(n: usize, least: usize) -> Vec<usize> {
    let counts = (0..).map(|step| (n as f64 * (f64::from(step) / -STEPS).exp2()).round() as usize);
    let mut grid: Vec<usize> = counts.take_while(|&cells| cells > least.min(n)).collect();
    grid.push(least.min(n));
    grid.dedup();
    grid
}

/// Returns C*: the smallest count of a descending `grid` such that it and every larger measured count stay within the
/// target.
///
/// The drift (`measure`, a KL) rises as cells are removed, but not at every step. The search therefore goes down the
/// grid in strides until one measurement fails, then bisects the stride with the border. Counts below a failure are
/// ignored even if they would reach the target. The first count is the full cache, which has no drift and is not
/// measured.
///
/// # Errors
/// Those of `measure`.
pub fn fewest<E>(grid: &[usize], target: f64, mut measure: impl FnMut(usize) -> Result<f64, E>) -> Result<usize, E> {
    let last = grid.len() - 1;
    let (mut good, mut bad) = (0, grid.len());
    while good + 1 < bad {
        let next = if bad > last { last.min(good + STRIDE) } else { good.midpoint(bad) };
        if measure(grid[next])? <= target {
            good = next;
        } else {
            bad = next;
        }
    }
    Ok(grid[good])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns C* under a curve, and the measured counts.
    fn search(n: usize, target: f64, kl: impl Fn(usize) -> f64) -> (usize, Vec<usize>) {
        let mut tried = Vec::new();
        let found = fewest(&grid(n, 68), target, |cells| {
            tried.push(cells);
            Ok::<_, ()>(kl(cells))
        });
        (found.unwrap(), tried)
    }

    #[test]
    fn a_grid_falls_from_all_to_the_least_in_equal_parts() {
        let cells = grid(2048, 68);
        assert_eq!((cells[0], cells[8], cells[16], cells[cells.len() - 1]), (2048, 1024, 512, 68));
        assert!(cells.windows(2).all(|pair| pair[0] > pair[1] && (pair[0] as f64 / pair[1] as f64) < 1.1));
        assert_eq!(grid(50, 68), [50]);
        assert_eq!(grid(68, 68), [68]);
        assert_eq!(grid(70, 68), [70, 68]);
    }

    #[test]
    fn the_border_of_a_falling_curve_is_found_wherever_it_is() {
        for &border in &grid(2048, 68) {
            let (found, tried) = search(2048, 0.02, |cells| if cells >= border { 0.02 } else { 0.021 });
            assert_eq!(found, border);
            assert!(tried.len() <= 13, "{tried:?}");
        }
    }

    #[test]
    fn what_reaches_the_target_below_a_failure_does_not_count() {
        let bumpy = |cells: usize| if (700..800).contains(&cells) || cells < 200 { 1.0 } else { 0.0 };
        assert_eq!(search(2048, 0.1, bumpy).0, 861);
    }

    #[test]
    fn without_a_failure_only_what_always_stays_is_left() {
        assert_eq!(search(1000, 0.1, |_| 0.0).0, 68);
        assert_eq!(search(1000, 0.1, |_| f64::NAN).0, 1000);
        assert_eq!(search(60, 0.1, |_| 1.0), (60, vec![]));
    }

    #[test]
    fn a_failing_measurement_ends_the_search() {
        assert_eq!(fewest(&[9, 5, 3], 0.1, Err), Err(3));
    }
}
