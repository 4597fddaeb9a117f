//! llama.cpp's environment variables: each sets a flag that the command line does not give.

use std::env;
use std::ffi::{OsStr, OsString};

use clap::builder::{StringValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command};

use super::shorthand::spellings;

/// Long flags and llama.cpp's variables for them. A flag that says no (`--no-x`) for a variable that says yes has two variables:
/// `LLAMA_ARG_X=0` and `LLAMA_ARG_NO_X`.
pub const VARIABLES: [(&str, &str); 40] = [
    ("batch-size", "LLAMA_ARG_BATCH"),
    ("cache-type-k", "LLAMA_ARG_CACHE_TYPE_K"),
    ("cache-type-v", "LLAMA_ARG_CACHE_TYPE_V"),
    ("chat-template", "LLAMA_ARG_CHAT_TEMPLATE"),
    ("chat-template-file", "LLAMA_ARG_CHAT_TEMPLATE_FILE"),
    ("chat-template-kwargs", "LLAMA_ARG_CHAT_TEMPLATE_KWARGS"),
    ("cpu-moe", "LLAMA_ARG_CPU_MOE"),
    ("ctx-size", "LLAMA_ARG_CTX_SIZE"),
    ("device", "LLAMA_ARG_DEVICE"),
    ("flash-attn", "LLAMA_ARG_FLASH_ATTN"),
    ("frequency-penalty", "LLAMA_ARG_FREQUENCY_PENALTY"),
    ("load-mode", "LLAMA_ARG_LOAD_MODE"),
    ("main-gpu", "LLAMA_ARG_MAIN_GPU"),
    ("min-p", "LLAMA_ARG_MIN_P"),
    ("model", "LLAMA_ARG_MODEL"),
    ("n-cpu-moe", "LLAMA_ARG_N_CPU_MOE"),
    ("n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS"),
    ("no-kv-offload", "LLAMA_ARG_KV_OFFLOAD"),
    ("override-tensor", "LLAMA_ARG_OVERRIDE_TENSOR"),
    ("predict", "LLAMA_ARG_N_PREDICT"),
    ("presence-penalty", "LLAMA_ARG_PRESENCE_PENALTY"),
    ("repeat-penalty", "LLAMA_ARG_REPEAT_PENALTY"),
    ("rope-freq-base", "LLAMA_ARG_ROPE_FREQ_BASE"),
    ("rope-freq-scale", "LLAMA_ARG_ROPE_FREQ_SCALE"),
    ("rope-scale", "LLAMA_ARG_ROPE_SCALE"),
    ("rope-scaling", "LLAMA_ARG_ROPE_SCALING_TYPE"),
    ("rpc", "LLAMA_ARG_RPC"),
    ("split-mode", "LLAMA_ARG_SPLIT_MODE"),
    ("swa-full", "LLAMA_ARG_SWA_FULL"),
    ("temp", "LLAMA_ARG_TEMPERATURE"),
    ("tensor-split", "LLAMA_ARG_TENSOR_SPLIT"),
    ("threads", "LLAMA_ARG_THREADS"),
    ("top-k", "LLAMA_ARG_TOP_K"),
    ("top-p", "LLAMA_ARG_TOP_P"),
    ("ubatch-size", "LLAMA_ARG_UBATCH"),
    ("yarn-attn-factor", "LLAMA_ARG_YARN_ATTN_FACTOR"),
    ("yarn-beta-fast", "LLAMA_ARG_YARN_BETA_FAST"),
    ("yarn-beta-slow", "LLAMA_ARG_YARN_BETA_SLOW"),
    ("yarn-ext-factor", "LLAMA_ARG_YARN_EXT_FACTOR"),
    ("yarn-orig-ctx", "LLAMA_ARG_YARN_ORIG_CTX"),
];

/// Flags whose variable is ignored if one of these flags is given, which say the same or the contrary.
const YIELDS: [(&str, &[&str]); 6] = [
    ("chat-template", &["--chat-template-file", "--raw"]),
    ("chat-template-file", &["--chat-template", "--raw"]),
    ("chat-template-kwargs", &["--raw"]),
    ("load-mode", &["--no-mmap", "--mlock"]),
    ("rope-freq-scale", &["--rope-scale"]),
    ("rope-scale", &["--rope-freq-scale"]),
];

/// Commands whose flags share names with llama.cpp's flags but do not read their variables.
const OTHERS: [&str; 1] = ["rpc-server"];

/// Makes the flags of all commands read their variables, except where a flag in `args` overrules the variable.
pub fn attach(command: Command, args: &[OsString]) -> Command {
    command.mut_subcommands(|sub| {
        if OTHERS.contains(&sub.get_name()) {
            return sub;
        }
        attach(sub, args).mut_args(|arg| match variable_of(&arg) {
            Some(variable) if !yields(&arg, args) => read(arg, variable),
            _ => arg,
        })
    })
}

/// Returns the variable whose value clap rejected.
pub fn origin(command: &Command, error: &clap::Error, args: &[OsString]) -> Option<&'static str> {
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else { return None };
    let long = flag.split_whitespace().next()?;
    let mut all = command.get_subcommands().flat_map(Command::get_arguments);
    let arg = all.find(|arg| spellings(arg).iter().any(|spelling| spelling == long))?;
    let variable = variable_of(arg).filter(|variable| env::var_os(variable).is_some())?;
    let is_given = spellings(arg).iter().any(|spelling| args.iter().any(|given| spells(given, spelling)));
    (!is_given).then_some(variable)
}

fn variable_of(arg: &Arg) -> Option<&'static str> {
    VARIABLES.iter().find(|(long, _)| arg.get_long() == Some(long)).map(|&(_, variable)| variable)
}

fn yields(arg: &Arg, args: &[OsString]) -> bool {
    let others = YIELDS.iter().find(|(long, _)| arg.get_long() == Some(long)).map_or(&[][..], |(_, others)| others);
    others.iter().any(|other| args.iter().any(|given| spells(given, other)))
}

/// Whether `given` is this flag, with or without a value after `=`.
fn spells(given: &OsStr, spelling: &str) -> bool {
    given.to_str().is_some_and(|given| given.split('=').next() == Some(spelling))
}

fn read(arg: Arg, variable: &'static str) -> Arg {
    if !matches!(arg.get_action(), ArgAction::SetTrue) {
        return arg.env(variable).hide_env_values(true);
    }
    let contrary = contrary_of(arg.get_long().unwrap_or_default(), variable);
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let names = contrary.as_ref().map_or_else(|| variable.to_owned(), |contrary| format!("{variable}=0, {contrary}"));
    let arg = arg.help(format!("{help} [env: {names}]"));
    match is_on(variable, contrary.as_deref(), |name| env::var(name).ok()) {
        Ok(true) => arg.default_value("true"),
        Ok(false) => arg,
        // clap reports the invalid value
        Err(_) => arg.env(variable).hide_env(true).value_parser(StringValueParser::new().try_map(|text| truth(&text))),
    }
}

/// Returns the variable that says no, for a flag that turns something off.
fn contrary_of(long: &str, variable: &str) -> Option<String> {
    let denies = long.starts_with("no-") && !variable.starts_with("LLAMA_ARG_NO_");
    denies.then(|| variable.replacen("LLAMA_ARG_", "LLAMA_ARG_NO_", 1))
}

/// Whether the variables turn a switch on. As in llama.cpp, the variable that says no counts whatever its value is.
fn is_on(variable: &str, contrary: Option<&str>, value: impl Fn(&str) -> Option<String>) -> Result<bool, &'static str> {
    if contrary.and_then(&value).is_some() {
        return Ok(true);
    }
    match value(variable) {
        Some(text) => truth(&text).map(|yes| yes == contrary.is_none()),
        None => Ok(false),
    }
}

/// Parses llama.cpp's words for yes and no.
fn truth(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" | "enabled" | "true" | "1" => Ok(true),
        "off" | "disabled" | "false" | "0" => Ok(false),
        _ => Err("use 1 or 0"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_understand_llama_cpps_yes_and_no() {
        let no = contrary_of("no-test", "LLAMA_ARG_TEST");
        assert_eq!(no.as_deref(), Some("LLAMA_ARG_NO_TEST"));
        assert_eq!(contrary_of("no-host", "LLAMA_ARG_NO_HOST"), None);
        assert_eq!(contrary_of("test", "LLAMA_ARG_TEST"), None);
        let says = |contrary: Option<&str>, name: &str, text: &str| {
            is_on("LLAMA_ARG_TEST", contrary, |asked| (asked == name).then(|| text.into()))
        };
        for (text, yes) in [("1", true), ("on", true), ("true", true), ("0", false), ("disabled", false)] {
            assert_eq!(says(None, "LLAMA_ARG_TEST", text), Ok(yes), "{text}");
            assert_eq!(says(no.as_deref(), "LLAMA_ARG_TEST", text), Ok(!yes), "{text}");
            assert_eq!(says(no.as_deref(), "LLAMA_ARG_NO_TEST", text), Ok(true), "whatever it says: {text}");
        }
        assert_eq!(says(no.as_deref(), "LLAMA_ARG_OTHER", "1"), Ok(false));
        assert!(says(None, "LLAMA_ARG_TEST", "maybe").is_err());
    }
}
