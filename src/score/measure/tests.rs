//! Compares a device's scores of keys and values with float64: chunks of cells, cells of other sequences, heads of several sizes.

use half::f16;
use rand::{RngExt, SeedableRng};

use super::super::LayerQueries;
use super::super::graph::{CellsView, Coarseness, Grain, LayerGraph};
use super::super::results::{Gathered, LayerScores};
use super::STEP;
use crate::backend::Devices;
use crate::cache::{self, Cell, Layout, PRETEND_DEVICE};
use crate::llama::{CacheType, Context, Token};
use crate::policy::Needs;
use crate::sys;
use crate::tests::fixture::{F16, F16_FLASH, Q8_0, Setup, apart, context, decode, dot, is_within, largest, row};
use crate::tests::tiny::{N_VOCAB, SPECS, Spec, Tiny};

const LAYER: usize = 1;

/// Value norms and key cosines of one layer's heads, and the bytes of compute memory.
struct Measured {
    norms: Vec<Vec<f32>>,
    cosines: Vec<Vec<f32>>,
    bytes: usize,
}

fn measure(layout: &Layout, cells: &[Cell], grain: Grain) -> Measured {
    PRETEND_DEVICE.set(true);
    let layer = &layout.layers[LAYER];
    let view = CellsView::new(cells);
    let graph = LayerGraph {
        layer,
        stream: layout.info.stream as usize,
        view: &view,
        queries: LayerQueries::none(),
        coarseness: None::<Coarseness>,
        grain,
        v_trans: layout.info.v_trans,
        n_cells: layout.n_cells(),
    };
    let mut devices = Devices::new(2);
    let needs = Needs { value_norm: true, key_similarity: true, ..Needs::default() };
    let mut scores = LayerScores::default();
    // SAFETY: K's storage lives as long as the context.
    let device = unsafe { devices.at((*layer.k).buffer) }.unwrap();
    graph.compute(device, needs, None, &mut scores).unwrap();
    let mut gathered = Gathered::default();
    gathered.fill(&scores, cells);
    let heads = (0..layer.n_head_kv as usize).map(|head| gathered.head(head));
    let (norms, cosines) = heads.map(|s| (s.value_norm.to_vec(), s.key_similarity.to_vec())).unzip();
    let bytes = devices.release();
    PRETEND_DEVICE.set(false);
    Measured { norms, cosines, bytes }
}

fn grain(cells: usize, step: usize) -> Grain {
    Grain { columns: 1, kv_heads: 1, cells, step, is_coarse: true }
}

/// A cache whose sequence 0 has cells out of order, with holes and cells of sequence 1 between them.
fn cut_up(tiny: &Tiny, setup: Setup) -> (Context, Vec<Cell>) {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(6);
    let tokens: Vec<Token> = (0..230).map(|_| rng.random_range(0..N_VOCAB as Token)).collect();
    let mut ctx = context(&tiny.model, setup, 512, 512);
    decode(&mut ctx, &tokens[..70], 0, 0);
    decode(&mut ctx, &tokens[..40], 0, 1);
    decode(&mut ctx, &tokens[70..150], 70, 0);
    ctx.remove(1, 10, 25);
    decode(&mut ctx, &tokens[150..], 150, 0);
    assert!(ctx.remove(0, 20, 27), "a part of a sequence can be removed");
    let cells = cache::cells(&ctx, 0);
    let n_kv = cells.iter().map(|cell| cell.index + 1).max().unwrap() as usize;
    assert!(n_kv > cells.len() + 7 && !n_kv.is_multiple_of(STEP) && !n_kv.is_multiple_of(2), "{n_kv}");
    assert!(cells.windows(2).any(|pair| pair[0].index > pair[1].index), "the cells are out of order");
    (ctx, cells)
}

/// Largest errors of lengths and of cosines.
fn errors(layout: &Layout, cells: &[Cell], measured: &Measured) -> [f64; 2] {
    let mut errors = [const { Vec::new() }; 2];
    for kv in 0..layout.layers[LAYER].n_head_kv as usize {
        let length = |v: &Vec<f32>| dot(v, v).sqrt();
        let [values, keys] = [true, false].map(|is_v| cells.iter().map(move |c| row(layout, LAYER, is_v, kv, c)));
        errors[0].push(apart(&measured.norms[kv], &values.map(|v| length(&v)).collect::<Vec<_>>()));
        let keys: Vec<_> = keys.collect();
        let mut mean = vec![0.0; keys[0].len()];
        for key in &keys {
            mean.iter_mut().zip(key).for_each(|(m, k)| *m += f64::from(*k) / length(key));
        }
        let of_mean = mean.iter().map(|m| m * m).sum::<f64>().sqrt();
        let cosine =
            |key: &Vec<f32>| key.iter().zip(&mean).map(|(k, m)| f64::from(*k) * m).sum::<f64>() / length(key) / of_mean;
        errors[1].push(apart(&measured.cosines[kv], &keys.iter().map(cosine).collect::<Vec<_>>()));
    }
    errors.map(largest)
}

#[test]
fn a_device_measures_what_float64_does() {
    let dir = tempfile::tempdir().unwrap();
    let mixed = Setup { v: CacheType::Q8_0, ..F16_FLASH };
    let mut all_hold = true;
    for (head, n_head_kv) in [(64, 3), (80, 2), (96, 5), (128, 2), (64, 1), (32, 8)] {
        let tiny = Tiny::new(dir.path(), Spec { head, n_head_kv, n_head: 2 * n_head_kv, ..SPECS[0] });
        for setup in [F16, F16_FLASH, Q8_0, mixed] {
            let has_blocks = setup.v == CacheType::Q8_0;
            if has_blocks && !head.is_multiple_of(32) {
                continue; // llama.cpp has no such cache
            }
            let (ctx, cells) = cut_up(&tiny, setup);
            let layout = Layout::of(&ctx, 0).unwrap();
            // several chunks and one chunk, and a stream whose size is not a multiple of larger steps
            for grain in [grain(STEP, STEP), grain(2 * STEP, STEP), grain(64 * STEP, STEP), grain(48, 16), grain(5, 1)]
            {
                let [lengths, cosines] = errors(&layout, &cells, &measure(&layout, &cells, grain));
                let what = format!("{n_head_kv} heads of {head}, {} at once, {setup}", grain.cells);
                // an identity matrix for q8_0 numbers is rounded too, and a GPU sums squares of 10 bits; the mean direction is rounded to
                // q8 or f16 before it meets the keys
                let of_lengths = if has_blocks { 2e-3 } else { 1e-5 };
                let of_cosines = if setup.k == CacheType::Q8_0 { 3e-2 } else { 2e-3 };
                all_hold &= is_within(format_args!("lengths of values, {what}"), lengths, of_lengths);
                all_hold &= is_within(format_args!("cosines of keys, {what}"), cosines, of_cosines);
            }
        }
    }
    assert!(all_hold, "a measure is not that of float64: see what was measured");
}

/// Rows are multiplied with those of neighbouring cells, whoever owns these.
#[test]
fn lengths_do_not_depend_on_what_other_cells_hold() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new(dir.path(), Spec { head: 64, n_head_kv: 2, n_head: 4, ..SPECS[0] });
    let (ctx, cells) = cut_up(&tiny, F16_FLASH);
    let layout = Layout::of(&ctx, 0).unwrap();
    let before = measure(&layout, &cells, grain(STEP, STEP));
    let n_kv = cells.iter().map(|cell| cell.index + 1).max().unwrap();
    let mut is_own = vec![false; layout.n_cells()];
    cells.iter().for_each(|cell| is_own[cell.index as usize] = true);
    let v = layout.layers[LAYER].v;
    for (i, _) in is_own.iter().enumerate().filter(|(_, is_own)| !**is_own) {
        let number = if i.is_multiple_of(2) { f16::INFINITY } else { f16::NAN };
        // SAFETY: a whole row of V, which lies in one stream.
        unsafe {
            let data = number.to_le_bytes().repeat((*v).ne[0] as usize);
            sys::ggml_backend_tensor_set(v, data.as_ptr().cast(), i * (*v).nb[1], data.len());
        }
    }
    let after = measure(&layout, &cells, grain(STEP, STEP));
    assert!((n_kv as usize) < layout.n_cells() && before.norms == after.norms);
}

/// Both ends of the f16 range: squares of the largest numbers exceed it, and those of the smallest vanish.
#[test]
fn lengths_of_the_largest_and_the_smallest_numbers_hold() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new(dir.path(), Spec { head: 128, n_head_kv: 2, n_head: 4, ..SPECS[0] });
    let (ctx, cells) = cut_up(&tiny, F16_FLASH);
    let layout = Layout::of(&ctx, 0).unwrap();
    let [k, v] = [layout.layers[LAYER].k, layout.layers[LAYER].v];
    for number in [f16::MAX, f16::from_f32(-300.0), f16::MIN_POSITIVE_SUBNORMAL] {
        for storage in [k, v] {
            // SAFETY: all of the first stream, whose rows are contiguous.
            unsafe {
                let data = number.to_le_bytes().repeat((*storage).ne[0] as usize * layout.n_cells());
                sys::ggml_backend_tensor_set(storage, data.as_ptr().cast(), 0, data.len());
            }
        }
        let measured = measure(&layout, &cells, grain(STEP, STEP));
        let [lengths, cosines] = errors(&layout, &cells, &measured);
        assert!(lengths < 1e-5 && cosines < 2e-3, "{number}: {lengths} {cosines}");
    }
}

#[test]
fn a_chunk_takes_no_more_room_than_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new(dir.path(), Spec { head: 128, n_head_kv: 2, n_head: 4, ..SPECS[0] });
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let tokens: Vec<Token> = (0..900).map(|_| rng.random_range(0..N_VOCAB as Token)).collect();
    for setup in [F16_FLASH, Q8_0, F16] {
        let mut ctx = context(&tiny.model, setup, 1024, 512);
        decode(&mut ctx, &tokens, 0, 0);
        let layout = Layout::of(&ctx, 0).unwrap();
        let cells = cache::cells(&ctx, 0);
        let layer = &layout.layers[LAYER];
        let room = 400 << 10;
        let grain = Grain::on_device(layer, cells.len(), layout.n_cells(), 0, room);
        // as f32, with products, or with squares
        assert_eq!((grain.step, grain.cells), (STEP, room / (2 * 2 * 128 * 4) / STEP * STEP), "{setup}");
        assert!(cells.len() > 3 * grain.cells / 2, "{setup}: several chunks");
        let measured = measure(&layout, &cells, grain);
        // two numbers of a head and cell are read, a third is transient, and there is an identity matrix
        let beside = cells.len() * 2 * 4 * 4 + 2 * 128 * 128 * 4 * 2;
        assert!(measured.bytes < room + beside, "{setup}: {} bytes", measured.bytes);
        let [lengths, cosines] = errors(&layout, &cells, &measured);
        assert!(lengths < 2e-3 && cosines < 3e-2, "{setup}: {lengths} {cosines}");
    }
}

/// No read leaves a stream whose cells are not a multiple of a step, although llama.cpp makes no such stream.
#[test]
fn a_step_never_leaves_a_stream() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new(dir.path(), SPECS[0]);
    let ctx = context(&tiny.model, F16_FLASH, 512, 512);
    let layout = Layout::of(&ctx, 0).unwrap();
    for n_cells in [256, 1000, 1001, 4096, 24] {
        let Grain { cells, step, .. } = Grain::on_device(&layout.layers[LAYER], n_cells, n_cells, 0, 1 << 20);
        assert!(step > 0 && n_cells.is_multiple_of(step) && cells.is_multiple_of(step), "{n_cells}: {cells} {step}");
    }
    assert!(layout.n_cells().is_multiple_of(256));
}
