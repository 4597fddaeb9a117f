//! After a compaction the cache is an ordinary cache: decoding, reuse, removal, saving, compacting again.

#![forbid(unsafe_code)]

use super::fixture::*;
use crate::cache::{Layout, cells_free};
use crate::compact::{self, CompactError};
use crate::llama::{Context, Pos};
use crate::score::Scorer;

const N: usize = 600;
const C: usize = 200;

fn compacted(setup: Setup) -> (Context, Layout) {
    let model = model();
    let mut ctx = context(&model, setup, 1024, 512);
    decode(&mut ctx, &tokens(&model, N), 0, 0);
    let layout = Layout::of(&ctx, 0).unwrap();
    compact(&mut ctx, 0, &random_heads(&layout, N, C, 11)).unwrap();
    (ctx, layout)
}

#[test]
fn fewer_cells_are_read_and_freed_ones_are_used_again() {
    let model = model();
    let next = tokens(&model, N + 60)[N..].to_vec();
    for setup in [F16, F16_FLASH, Q4_0] {
        let (mut ctx, layout) = compacted(setup);
        assert_eq!(cells(&ctx).len(), C);
        assert_eq!(cells_free(&ctx, 0), 1024 - C);
        assert_eq!(ctx.pos_max(0), Some(N as i32 - 1));

        let attention = record(&mut ctx, &layout, |ctx| decode(ctx, &next[..1], N as i32, 0));
        assert!(attention.iter().all(|a| a.n_kv == 256), "{setup:?}: n_kv is {}", attention[0].n_kv);

        decode(&mut ctx, &next[1..], N as i32 + 1, 0);
        let cells = cells(&ctx);
        assert_eq!(cells.len(), C + 60);
        assert!(cells.iter().all(|c| (c.index as usize) < C + 60), "freed cells are filled first");
        assert_eq!(cells.last().unwrap().pos, N as i32 + 59, "positions go on");
    }
}

#[test]
fn positions_ascend_and_a_removed_tail_leaves_no_newer_key() {
    let model = model();
    let mut ctx = context(&model, F16, 1024, 512);
    decode(&mut ctx, &tokens(&model, N), 0, 0);
    let layout = Layout::of(&ctx, 0).unwrap();
    let before = cells(&ctx);
    let selection = random_heads(&layout, N, C, 5);
    let key = |cell| row(&layout, 4, false, 2, cell);
    let head = 4 * layout.layers[0].n_head_kv as usize + 2;
    let kept: Vec<_> = selection.kept_by(head).unwrap().iter().map(|&c| (c, key(&before[c as usize]))).collect();
    compact(&mut ctx, 0, &selection).unwrap();

    let after = cells(&ctx);
    assert!(after.windows(2).all(|w| w[0].pos < w[1].pos), "labels ascend");
    let cut = 400;
    ctx.remove(0, cut, -1);
    let rest = cells(&ctx);
    assert!(rest.iter().all(|c| c.pos < cut));
    assert!(!rest.is_empty() && rest.len() < C);
    for (i, cell) in rest.iter().enumerate() {
        assert_eq!(key(cell), kept[i].1, "cell {i} holds the head's {i}-th kept row");
        assert!((kept[i].0 as i32) < cut, "no key at or past the cut stays");
    }
}

#[test]
fn the_state_can_be_saved_and_loaded() {
    let model = model();
    let next = tokens(&model, N + 1)[N];
    for setup in [F16, Q8_0] {
        let (mut ctx, _) = compacted(setup);
        let state = save_state(&ctx, 0);
        let expected = next_logits(&mut ctx, next, N as i32);

        let mut fresh = context(&model, setup, 512, 512);
        load_state(&mut fresh, 0, &state);
        assert_eq!(cells(&fresh).len(), C, "a smaller context is enough");
        assert!(next_logits(&mut fresh, next, N as i32) == expected, "{setup:?}");
    }
}

#[test]
fn a_second_compaction_works() {
    let model = model();
    let (mut ctx, layout) = compacted(F16);
    let more = tokens(&model, N + 50)[N..].to_vec();
    decode(&mut ctx, &more, N as i32, 0);
    let n = C + 50;
    let before = cells(&ctx);
    let selection = random_heads(&layout, n, 90, 3);
    let expected: Vec<_> =
        selection.kept_by(7).unwrap().iter().map(|&c| row(&layout, 2, true, 1, &before[c as usize])).collect();
    compact(&mut ctx, 0, &selection).unwrap();
    let after = cells(&ctx);
    assert_eq!(after.len(), 90);
    for (cell, expected) in after.iter().zip(expected) {
        assert_eq!(row(&layout, 2, true, 1, cell), expected);
    }
    assert_eq!(ctx.pos_max(0), Some(N as i32 + 49));
}

#[test]
fn other_sequences_and_any_cell_order_are_left_alone() {
    let model = model();
    let tokens = tokens(&model, N + 1);
    for setup in [F16, F16_FLASH] {
        let mut ctx = context(&model, setup, 1024, 512);
        decode(&mut ctx, &tokens[..60], 0, 0);
        decode(&mut ctx, &tokens[100..180], 0, 1);
        decode(&mut ctx, &tokens[60..200], 60, 0);
        ctx.remove(1, 10, 40);
        decode(&mut ctx, &tokens[200..300], 200, 0);
        let layout = Layout::of(&ctx, 0).unwrap();
        let before = cells(&ctx);
        assert!(before.windows(2).any(|w| w[0].index > w[1].index), "out of order");
        let others = crate::cache::cells(&ctx, 1);
        let rows_of =
            |cells: &[crate::cache::Cell]| -> Vec<_> { cells.iter().map(|c| row(&layout, 9, true, 0, c)).collect() };
        let other_rows = rows_of(&others);

        let selection = random_heads(&layout, 300, 120, 4);
        let expected: Vec<_> =
            selection.kept_by(27).unwrap().iter().map(|&c| row(&layout, 9, true, 0, &before[c as usize])).collect();
        compact(&mut ctx, 0, &selection).unwrap();

        assert_eq!(rows_of(&cells(&ctx)), expected, "{setup:?}");
        assert_eq!(crate::cache::cells(&ctx, 1), others);
        assert_eq!(rows_of(&others), other_rows);
    }
}

#[test]
fn a_refused_compaction_changes_nothing() {
    let model = model();
    let tokens = tokens(&model, N + 1);
    let mut ctx = context(&model, F16, 1024, 512);
    decode(&mut ctx, &tokens[..N], 0, 0);
    let layout = Layout::of(&ctx, 0).unwrap();
    let before = cells(&ctx);
    let heads = n_heads(&layout);
    let refuse = |ctx: &mut Context, selection| {
        let error = compact(ctx, 0, &selection).unwrap_err();
        assert_eq!(cells(ctx), before, "{error}");
        error
    };
    let wrong_n = refuse(&mut ctx, composite(N - 1, 1, vec![0; heads]));
    assert!(matches!(wrong_n, CompactError::Changed { .. }), "{wrong_n}");
    let descending = refuse(&mut ctx, composite(N, 2, [N as u32 - 1, 0].repeat(heads)));
    assert!(matches!(descending, CompactError::Malformed { .. }), "{descending}");
    let too_few = refuse(&mut ctx, composite(N, 2, vec![0, N as u32 - 1]));
    assert!(matches!(too_few, CompactError::Malformed { .. }), "{too_few}");
    let beyond = refuse(&mut ctx, composite(N, 1, vec![N as u32; heads]));
    assert!(matches!(beyond, CompactError::Malformed { .. }), "{beyond}");
    let last_dropped = refuse(&mut ctx, composite(N, 1, vec![0; heads]));
    assert!(matches!(last_dropped, CompactError::LastDropped), "{last_dropped}");

    // cells that were read before the sequence changed
    let selection = random_heads(&layout, N, C, 11);
    let other_index = {
        let mut cells = before.clone();
        cells[3].index = N as u32;
        cells
    };
    let other_pos = {
        let mut cells = before.clone();
        cells[N - 1].pos += 1;
        cells
    };
    for cells in [other_index, other_pos] {
        let error = compact::compact(&mut ctx, 0, &cells, &selection, Scorer::new(1, 1).devices(), None).unwrap_err();
        assert!(matches!(error, CompactError::Cache(_)), "{error}");
    }
    decode(&mut ctx, &tokens[N..], N as Pos, 0);
    let error = compact::compact(&mut ctx, 0, &before, &selection, Scorer::new(1, 1).devices(), None).unwrap_err();
    assert!(matches!(error, CompactError::Cache(_)), "{error}");
    ctx.remove(0, N as Pos, -1);
    assert_eq!(cells(&ctx), before);

    let expected = next_logits(&mut ctx, tokens[N], N as i32);
    let mut untouched = context(&model, F16, 1024, 512);
    decode(&mut untouched, &tokens[..N], 0, 0);
    assert!(next_logits(&mut untouched, tokens[N], N as i32) == expected);
}

#[test]
fn shared_cells_are_refused() {
    let model = model();
    let mut ctx = context(&model, F16, 1024, 512);
    decode(&mut ctx, &tokens(&model, 100), 0, 0);
    ctx.copy(0, 1).unwrap();
    let layout = Layout::of(&ctx, 0).unwrap();
    let error = compact(&mut ctx, 0, &random_heads(&layout, 100, 50, 1)).unwrap_err();
    assert!(matches!(error, CompactError::Shared), "{error}");
}
