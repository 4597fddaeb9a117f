//! Returns the memory of unused cells to the system.
//!
//! llama.cpp allocates the memory of all cells when it makes a context, and Linux counts a page from the first write on. The memory that a
//! vote freed would stay counted, although it is not needed before it is written again. These pages are returned to the system and read as
//! zeros until then, as in a new context: llama.cpp masks free cells, but reads them.

use std::ops::Range;

use crate::cache::{self, Layout};
use crate::llama::{Context, SeqId};
use crate::sys;

/// Returns to the system the memory behind the last cell that any sequence uses in the stream of `seq`, if the cache lies in plain host
/// memory. Returns the bytes of these whole pages, whether resident or not.
pub(crate) fn give_back(ctx: &mut Context, seq: SeqId) -> usize {
    let Ok(layout) = Layout::of(ctx, seq) else { return 0 };
    if !layout.is_host() {
        return 0;
    }
    // SAFETY: valid context; llama.cpp may still be computing into the cache.
    unsafe { sys::gvote_shim_context_synchronize(ctx.as_ptr()) };
    // SAFETY: the layout is of this context, whose cache is idle now.
    unsafe { unused(&layout, cache::cells_end(ctx, seq)) }.into_iter().filter(discard).map(|pages| pages.len()).sum()
}

/// Returns the addresses of the whole pages of K and V that contain only cells from `end` on, in memory that belongs only to the cache.
///
/// # Safety
/// The context of the layout lives.
unsafe fn unused(layout: &Layout, end: usize) -> Vec<Range<usize>> {
    // SAFETY: plain query of the system.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(usize::MAX).max(1);
    let (n, stream) = (layout.n_cells(), layout.info.stream as usize);
    let mut pages = Vec::new();
    for layer in &layout.layers {
        for (storage, is_transposed) in [(layer.k, false), (layer.v, layout.info.v_trans)] {
            // SAFETY: a storage tensor of the cache, in whose stream cell after cell has a row; transposed, channel after channel has a
            // value of each cell.
            let (base, rows, row) = unsafe {
                let tensor = &*storage;
                if sys::ggml_backend_buffer_get_type(tensor.buffer) != sys::ggml_backend_cpu_buffer_type() {
                    // pages of other kinds may be pinned, or shared
                    continue;
                }
                let row = if is_transposed { sys::ggml_type_size(tensor.type_) } else { tensor.nb[1] };
                let rows = if is_transposed { tensor.ne[0] as usize } else { 1 };
                (tensor.data as usize + stream * tensor.nb[2], rows, row)
            };
            for first in (0..rows).map(|i| base + i * n * row) {
                let whole = (first + end.min(n) * row).next_multiple_of(page)..(first + n * row) / page * page;
                pages.extend(Some(whole).filter(|whole| !whole.is_empty()));
            }
        }
    }
    pages
}

/// Discards these pages. Returns whether the system took them back.
#[cfg(target_os = "linux")]
fn discard(pages: &Range<usize>) -> bool {
    // SAFETY: whole pages of the cache that hold nothing; they read as zeros afterwards.
    unsafe { libc::madvise(pages.start as *mut libc::c_void, pages.len(), libc::MADV_DONTNEED) == 0 }
}

/// Other systems do not specify the content of such pages.
#[cfg(not(target_os = "linux"))]
fn discard(_: &Range<usize>) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::compact::compact;
    use crate::llama::Pos;
    use crate::policy::{Bound, Kept, Selection};
    use crate::tests::fixture::{F16, F16_FLASH, Q8_0, context, decode, model, next_logits, on_device, tokens};

    const N: usize = 600;

    /// Counts the pages that are resident.
    fn resident(pages: &[Range<usize>]) -> usize {
        let of = |pages: &Range<usize>| {
            let mut flags = vec![0_u8; pages.len() / 4096];
            // SAFETY: whole pages of the cache, and a byte for each.
            let status = unsafe { libc::mincore(pages.start as *mut _, pages.len(), flags.as_mut_ptr()) };
            assert_eq!(status, 0);
            flags.iter().filter(|flag| **flag & 1 == 1).count()
        };
        pages.iter().map(of).sum()
    }

    #[test]
    fn pages_of_freed_cells_are_no_longer_in_memory_and_nothing_else_changes() {
        let model = model();
        let text = tokens(&model, N + 1);
        for setup in [F16, F16_FLASH, Q8_0] {
            // a page holds 2,048 values of a transposed V
            let mut ctx = context(&model, setup, 8192, 512);
            decode(&mut ctx, &text[..N], 0, 0);
            // another sequence in between
            decode(&mut ctx, &text[..50], 0, 1);
            decode(&mut ctx, &text[50..90], N as Pos, 0);
            let cells = cache::cells(&ctx, 0);
            let kept = Kept::Tokens((0..100).chain(N as u32 + 30..N as u32 + 40).collect());
            let selection = Selection { kept, bound: Bound::Ratio, ..Selection::all(cells.len()) };
            let left = compact(&mut ctx, 0, &cells, &selection, &mut [], None).unwrap();
            assert_eq!((left.len(), cache::cells_end(&ctx, 0)), (110, N + 50), "{setup}");

            let next = |ctx: &mut Context| {
                let logits = next_logits(ctx, text[N], N as Pos + 40);
                assert!(ctx.remove(0, N as Pos + 40, -1));
                logits
            };
            let expected = next(&mut ctx);
            let layout = Layout::of(&ctx, 0).unwrap();
            // SAFETY: the context lives.
            let pages = unsafe { unused(&layout, cache::cells_end(&ctx, 0)) };
            assert!(resident(&pages) > 0, "{setup}");
            assert_eq!(on_device(|| give_back(&mut ctx, 0)), 0);
            assert!(give_back(&mut ctx, 0) > 0, "{setup}");
            assert_eq!(resident(&pages), 0, "{setup}");
            assert!(next(&mut ctx) == expected, "{setup}");
            // after the other sequence is removed, more can be returned
            assert!(ctx.remove(1, 0, -1));
            let more = give_back(&mut ctx, 0);
            assert!(more > pages.iter().map(|pages| pages.len()).sum::<usize>(), "{setup}: {more}");
            assert!(next(&mut ctx) == expected, "{setup}");
        }
    }
}
