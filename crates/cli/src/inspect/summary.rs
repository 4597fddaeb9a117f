//! The description of a model file as text.

use gvote::llama::{CacheType, ContextParams};
use gvote_gguf::{Gguf, ModelInfo, Support};

use crate::table::{labelled, plain, table};
use crate::words::{bytes, count, plural};

/// Markup of well-known chat formats, and the name of each format.
const MARKUP: [(&str, &str); 9] = [
    ("<|im_start|>", "ChatML"),
    ("<|start_header_id|>", "Llama 3"),
    ("<start_of_turn>", "Gemma"),
    ("<|start_of_role|>", "Granite"),
    ("<|START_OF_TURN_TOKEN|>", "Command R"),
    ("<|channel|>", "Harmony"),
    ("<\u{ff5c}User\u{ff5c}>", "DeepSeek"),
    ("[INST]", "Mistral, Llama 2"),
    ("<|user|>", "Phi 3, Zephyr, GLM"),
];
/// Features that a chat template may support, and a word in it that shows them.
const ABILITIES: [(&str, &str); 3] = [("system message", "system"), ("tools", "tools"), ("thinking", "think")];

pub fn of(file: &Gguf) -> String {
    let info = &file.info;
    let or_unknown = |text: &Option<String>| text.as_deref().map_or_else(|| "not named".into(), plain);
    let mut out = String::new();
    let mut line = |label, text: &str| out += &labelled(label, text);

    line("file", &files(file));
    line("model", &format!("{} ({})", or_unknown(&info.name), plain(&info.architecture)));
    line("license", &or_unknown(&info.license));
    line("parameters", &format!("{} in {}", count(file.n_params() as usize), plural(file.tensors.len(), "tensor")));
    line("weights", &weights(file));
    out += &types(file);

    let mut line = |label, text: &str| out += &labelled(label, text);
    line("context", &format!("{} tokens", count(info.n_ctx_train)));
    line("layers", &format!("{}, {} values in a hidden state{}", info.n_layer, count(info.n_embd), experts(info)));
    line("heads", &heads(info));
    line("RoPE", &rope(info));
    line("window", &window(info));
    line("vocabulary", &vocabulary(info));
    line("template", &template(info));
    line("support", &support(info));
    if info.cached(false).next().is_some() {
        out += &cache(info);
    }
    out
}

fn files(file: &Gguf) -> String {
    let name = file.parts[0].path.file_name().map_or_else(String::new, |name| plain(&name.to_string_lossy()));
    let size = file.file_size() as usize;
    let parts = match file.parts.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    format!("{name}{parts}, {}, GGUF {}", bytes(size, size), file.version)
}

fn weights(file: &Gguf) -> String {
    let size = file.n_bytes() as usize;
    let mix = file.info.quantization.unwrap_or("file type not named");
    let bits = 8.0 * file.n_bytes() as f64 / file.n_params().max(1) as f64;
    format!("{}, {mix}, {bits:.2} bits a parameter", bytes(size, size))
}

fn types(file: &Gguf) -> String {
    let whole = file.n_bytes().max(1) as f64;
    let rows = file.by_type().into_iter().map(|share| {
        let (size, part) = share.bytes.map_or_else(
            || ("?".into(), "?".into()),
            |n| (bytes(n as usize, n as usize), format!("{:.1} %", 100.0 * n as f64 / whole)),
        );
        [share.name, count(share.tensors), size, part]
    });
    table(["type", "tensors", "bytes", "share"], rows, 1)
}

fn experts(info: &ModelInfo) -> String {
    match info.n_expert {
        (0, _) => String::new(),
        (n, used) => format!(", {used} of {n} experts"),
    }
}

fn heads(info: &ModelInfo) -> String {
    let (least, most) = (info.n_head_kv.iter().min().unwrap_or(&0), info.n_head_kv.iter().max().unwrap_or(&0));
    let kv = if least == most { most.to_string() } else { format!("{least} to {most}") };
    let size = match (info.n_embd_head_k, info.n_embd_head_v) {
        (k, v) if k == v => k.to_string(),
        (k, v) => format!("{k} (keys) and {v} (values)"),
    };
    format!("{}, {kv} KV heads of {size}", info.n_head)
}

fn rope(info: &ModelInfo) -> String {
    let rope = &info.rope;
    let parts = [
        rope.dims.map(|n| format!("{n} dimensions")),
        rope.base.map(|base| format!("base {base}")),
        rope.scaling.as_deref().map(|name| format!("scaling {}", plain(name))),
        rope.factor.map(|factor| format!("factor {factor}")),
        rope.original_context.map(|n| format!("{} tokens before scaling", count(n))),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "not described: the architecture's own".into() } else { parts.join(", ") }
}

fn window(info: &ModelInfo) -> String {
    match info.sliding_window {
        None => "none".into(),
        Some(n) => {
            let windowed = info.windowed.iter().filter(|&&w| w).count();
            format!("{} tokens in {windowed} of {} layers", count(n), info.n_layer)
        }
    }
}

fn vocabulary(info: &ModelInfo) -> String {
    let size = info.n_vocab.map_or_else(|| "size not named".into(), |n| format!("{} tokens", count(n as usize)));
    let kind = info.tokenizer.as_deref().map_or_else(String::new, |kind| format!(" ({})", plain(kind)));
    size + &kind
}

fn template(info: &ModelInfo) -> String {
    let Some(text) = &info.chat_template else {
        return "none: prompts are taken as they are".into();
    };
    let style = MARKUP.iter().find(|(mark, _)| text.contains(mark));
    let style = style.map_or_else(String::new, |(mark, name)| format!(", {name} ({mark})"));
    let knows: Vec<_> = ABILITIES.iter().filter(|(_, word)| text.contains(word)).map(|(name, _)| *name).collect();
    let knows = if knows.is_empty() { String::new() } else { format!(", knows {}", knows.join(", ")) };
    format!("{} characters{style}{knows}; see --metadata tokenizer.chat_template", count(text.chars().count()))
}

pub fn support(info: &ModelInfo) -> String {
    let full = info.cached(false).count();
    match info.support() {
        Support::Composite => format!("composite: all {full} layers are compressed, each head keeps its own tokens"),
        Support::BaseOnly => format!(
            "base cache only: the {full} layers that keep the whole context are compressed, the window's cache is left alone"
        ),
        Support::Refused(reason) => format!("refused: {reason}; --policy full runs what llama.cpp can run"),
    }
}

fn cache(info: &ModelInfo) -> String {
    let trained = info.n_ctx_train;
    let in_window = info.window_cells(trained, ContextParams::default().n_ubatch as usize);
    let rows = CacheType::all().map(|cache_type| {
        let name = cache_type.name().to_owned();
        if !info.can_cache(cache_type) {
            return [name, "heads do not fit its blocks".into(), String::new()];
        }
        let cell = info.kv_bytes_per_cell(cache_type, cache_type);
        let window = info.kv_bytes_per_window_cell(cache_type, cache_type).saturating_mul(in_window);
        let all = cell.saturating_mul(trained).saturating_add(window);
        [name, count(cell), bytes(all, all)]
    });
    let context = format!("{} cells", count(trained));
    let mut out = labelled("KV cache", "bytes of a cell, with K and V of the same type (-ctk, -ctv)");
    out += &table(["type", "bytes", &context], rows, 1);
    if info.sliding_window.is_some() {
        let cell = info.kv_bytes_per_window_cell(CacheType::F16, CacheType::F16);
        let text = format!(
            "with {} cells of {} bytes (f16) for the layers with the window, whatever -c is (not with --swa-full)",
            count(in_window),
            count(cell)
        );
        out += &labelled("", &text);
    }
    out
}
