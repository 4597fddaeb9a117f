//! A ranking of the entries whose cut has not been decided.

use super::rank::{self, Forced};
use super::{Bound, Evict, Params, Selection};

/// The smallest share of the cells that a trial may settle on. A short trial cannot tell what a later question needs.
/// With a tenth, half of all requests in a mixed set kept more than 1.6 times what they needed: see docs/results.md.
const LEAST_SHARE: f64 = 1.0 / 12.0;

/// Entries from best to worst, for each head or for all heads together. The caller decides how many are kept.
#[derive(Debug, Clone)]
pub struct Ranking {
    params: Params,
    forced: Forced,
    lists: usize,
    /// `[list][n]` entries from best to worst: first the forced entries.
    order: Vec<u32>,
    /// `[n + 1]` mean share of the mass that is lost at each count.
    curve: Vec<f64>,
}

impl Ranking {
    /// Creates a ranking with one list for each head, or with 1 list for all heads.
    pub(super) fn new(params: Params, forced: Forced, lists: usize, order: Vec<u32>, curve: Vec<f64>) -> Self {
        Self { params, forced, lists, order, curve }
    }

    /// Number of entries.
    pub fn n(&self) -> usize {
        self.forced.n
    }

    /// Returns the end of the sinks and the start of the recent entries. Entries below the first index and from the
    /// second on stay at any count, and so do the protected entries between them.
    pub fn forced(&self) -> (usize, usize) {
        (self.forced.head, self.forced.tail)
    }

    /// Returns the `[n]` entries of a head from best to worst: first the forced ones, ascending.
    pub fn of_head(&self, head: usize) -> &[u32] {
        let list = if self.lists == 1 { 0 } else { head };
        &self.order[list * self.n()..][..self.n()]
    }

    /// Returns the mean share of the mass that is lost at each count: `[n + 1]`, 0 to 1.
    pub fn curve(&self) -> &[f64] {
        &self.curve
    }

    /// Returns the fewest and the most cells that the bounds allow a trial to settle on.
    pub fn range(&self) -> (usize, usize) {
        let n = self.n();
        let most = self.params.max_cells.unwrap_or(n).min(n);
        let least = (LEAST_SHARE * n as f64).ceil() as usize;
        (least.max(self.forced.count()).max(self.params.min_cells).min(most), most)
    }

    /// Keeps the best `count` of each list, within the bounds; `rule` is the rule that asked for this count.
    pub fn keep(self, count: usize, rule: Bound) -> Selection {
        let n = self.n();
        let (count, bound) = rank::bounded(count, rule, &self.forced, &self.params);
        if bound == Bound::All {
            return Selection::all(n);
        }
        let kept = match self.params.evict {
            Evict::Cells => rank::keep_tokens(self.order, count),
            Evict::Composite => rank::keep_heads(self.order, n, count),
        };
        Selection { n, kept, lost_mass: Some(self.curve[count] as f32), bound, ragged: None }
    }

    /// Keeps the fewest entries that give up no more attention mass than `lost_mass`.
    pub fn by_lost_mass(self) -> Selection {
        let count = rank::smallest_count(&self.curve, self.params.lost_mass);
        self.keep(count, Bound::LostMass)
    }

    /// Keeps the requested share, or as much as the lost mass requires.
    pub(super) fn by_rule(self) -> Selection {
        if self.params.ratio.is_none() {
            return self.by_lost_mass();
        }
        let count = self.params.fixed_cells(self.n());
        self.keep(count, Bound::Ratio)
    }
}
