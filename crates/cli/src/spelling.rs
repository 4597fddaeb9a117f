//! Translation of settings into flags: the library's errors name settings between backticks, and users of the program know flags.

use std::collections::BTreeSet;
use std::sync::OnceLock;

/// Settings whose flags have another name, or a better known short form.
const FLAGS: [(&str, &str); 10] = [
    ("flash_attn", "-fa"),
    ("model", "-m"),
    ("n_ctx", "-c"),
    ("n_gpu_layers", "-ngl"),
    ("n_predict", "-n"),
    ("n_ubatch", "-ub"),
    ("port", "-p"),
    ("type_k", "-ctk"),
    ("type_v", "-ctv"),
    ("verbose", "-v"),
];

/// Replaces each `setting` in the text by its flag. Leaves other words between backticks unchanged.
pub fn with_flags(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('`') {
        out += before;
        rest = match after.split_once('`').and_then(|(name, after)| Some((flag(name)?, after))) {
            Some((flag, after)) => {
                out += &flag;
                after
            }
            None => {
                out.push('`');
                after
            }
        };
    }
    out + rest
}

fn flag(setting: &str) -> Option<String> {
    static LONG: OnceLock<BTreeSet<String>> = OnceLock::new();
    if let Some((_, flag)) = FLAGS.iter().find(|(name, _)| *name == setting) {
        return Some((*flag).to_owned());
    }
    let long = LONG.get_or_init(|| {
        let program = super::described();
        let flags = program.get_subcommands().flat_map(clap::Command::get_arguments);
        flags.filter_map(|flag| flag.get_long().map(str::to_owned)).collect()
    });
    let name = setting.replace('_', "-");
    long.contains(&name).then(|| format!("--{name}"))
}

#[cfg(test)]
mod tests {
    use gvote::SessionError;
    use gvote::llama::LlamaError;
    use gvote::policy::PolicyError;

    use super::*;

    #[test]
    fn settings_become_flags_and_nothing_else_does() {
        assert_eq!(with_flags("raise `n_ctx`, or lower `max_cells`"), "raise -c, or lower --max-cells");
        for text in ["the policy `full` drops nothing", "a ` alone", "``", "`no_such_thing`", "samples"] {
            assert_eq!(with_flags(text), text);
        }
        assert_eq!(with_flags("a ` before `samples`"), "a ` before --samples");
    }

    #[test]
    fn errors_of_the_library_name_flags_that_there_are() {
        for error in [
            PolicyError::MaxCells { cap: 1, sinks: 4, recent: 64, least: 69 }.to_string(),
            PolicyError::Forced { setting: "sinks", n: 1 << 40 }.to_string(),
            LlamaError::NoCells { needed: 2, free: 1, size: 8 }.to_string(),
            LlamaError::Rope.to_string(),
            LlamaError::NotANumber.to_string(),
            LlamaError::QuantizedV("q8_0").to_string(),
            SessionError::CacheTooSmall { n_ctx: 8, least: 90, protected: 3 }.to_string(),
            SessionError::Fixed("window").to_string(),
        ] {
            let said = with_flags(&error);
            assert!(!said.contains('`') && said.contains(" -") | said.starts_with("--"), "{error}: {said}");
        }
    }
}
