//! Generation without end.

use super::*;
use crate::session::Stop;
use crate::tests::fixture::F16;
use crate::tests::heap;

/// Tokens of one part of the answer.
const PART: usize = 1000;
/// Largest growth of the list of all tokens during the other parts: it doubles.
const TOKENS: isize = 4 * 8192;
/// Tolerance for other differences. A leak of one vote's data would exceed it over a hundred votes.
const SLACK: isize = 8 * 1024;

/// Five times the context length of the model's training, in few cells.
#[test]
fn an_answer_without_end_takes_no_more_cells_and_no_more_memory() {
    const CELLS: usize = 160;
    for (arch, kind) in [("llama", Kind::Gvote), ("gemma2", Kind::SnapKv)] {
        let mut session = open(arch, F16, CELLS, Params { policy: kind, ..quick() });
        let mut sampler =
            Sampler::new(session.model(), &SamplerParams { seed: 1, ..SamplerParams::default() }, 0).unwrap();
        read(&mut session, &words(100, 1));
        let mut marks = Vec::new();
        for part in 1..=5 {
            let report = session.generate(&mut sampler, PART as i32, |_| ControlFlow::Continue(())).unwrap();
            assert_eq!((report.tokens, report.stop), (PART, Stop::Limit), "{arch}");
            // each squeeze frees a quarter of the cells
            assert!(report.squeezes.count.abs_diff(PART / (CELLS / 4)) <= 1, "{arch}, part {part}: {report:?}");
            assert_eq!(session.n_past() as usize, 100 + part * PART);
            assert!(session.cells_used() <= CELLS, "{arch}: {}", session.cells_used());
            marks.push(heap::held());
        }
        let grown = marks[4] - marks[0];
        assert!(grown <= TOKENS + SLACK, "{arch}: {grown} bytes, {marks:?}");
        assert!(session.n_past() as usize > 4 * session.model().n_ctx_train());
    }
}
