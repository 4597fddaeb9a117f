//! Number of cells to free when a cache runs out of cells: one rule for a session and for an attached context.

use super::Params;

/// Share of all cells that is freed at once. Each time costs a vote, and free cells hold nothing.
const FREED: f64 = 0.25;

/// Returns the number of cells of `limit` that are freed at once.
pub fn freed_at_once(limit: usize) -> usize {
    (FREED * limit as f64) as usize
}

/// Returns how many of `limit` cells may stay if `needed` of them must be free. None if that is not more than `always`,
/// the number of cells that always stay.
pub fn most_cells(always: usize, limit: usize, needed: usize) -> Option<usize> {
    let most = limit.saturating_sub(needed.max(freed_at_once(limit)));
    (most > always).then_some(most)
}

/// Number of cells that always stay.
pub fn least_cells(policy: &Params) -> usize {
    policy.sinks + policy.recent
}

/// Returns the smallest limit for which [`most_cells`] returns a count when one cell is needed.
pub fn least_limit(always: usize) -> usize {
    let near = (always.saturating_add(1) as f64 / (1.0 - FREED)) as usize;
    (near.saturating_sub(2)..).find(|&limit| most_cells(always, limit, 1).is_some()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_is_the_first_that_will_do() {
        for always in (1..300).chain([10_000, 1 << 40]) {
            let least = least_limit(always);
            let most = most_cells(always, least, 1);
            assert!(most.is_some_and(|most| most > always), "{always}: {least}");
            assert_eq!(most_cells(always, least - 1, 1), None, "{always}: {least}");
        }
    }
}
