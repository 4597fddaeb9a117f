//! Python string and list methods that templates use and minijinja lacks.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value, context};
use minijinja_contrib::pycompat;

/// The function that replaces the operator `%`.
pub(super) const MODULO: &str = "__mod__";

/// `left % right`: the remainder of numbers, or a format string with its values.
pub(super) fn modulo(state: &State, left: &Value, right: &Value) -> Result<Value, Error> {
    let Some(text) = left.as_str() else {
        return state.env().compile_expression("left % right")?.eval(context! { left, right });
    };
    let values = right.downcast_object_ref::<Tuple>().map_or(std::slice::from_ref(right), |tuple| tuple);
    format(FormatStyle::Printf, text, values).map(Value::from)
}

/// Calls a method that minijinja does not define for a value.
pub(super) fn call(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match (value.as_str(), value.kind()) {
        (Some(text), _) => of_string(state, text, name, args)?,
        (None, ValueKind::Seq) if name == "index" => Some(index_of(value, args)?),
        _ => None,
    };
    own.map_or_else(|| pycompat::unknown_method_callback(state, value, name, args), Ok)
}

fn index_of(list: &Value, args: &[Value]) -> Result<Value, Error> {
    let (what,): (&Value,) = from_args(args)?;
    let at = list.try_iter()?.position(|item| item == *what);
    at.map(Value::from).ok_or_else(|| invalid(format!("{what:?} is not in list")))
}

fn of_string(state: &mut State, text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let value = match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "partition" => {
            let (at,): (&str,) = from_args(args)?;
            let (before, after) = split_at(text.split_once(at), at)?.unwrap_or((text, ""));
            let found = if before.len() == text.len() { "" } else { at };
            Tuple::from([before, found, after].map(Value::from)).into()
        }
        "rpartition" => {
            let (at,): (&str,) = from_args(args)?;
            let (before, after) = split_at(text.rsplit_once(at), at)?.unwrap_or(("", text));
            let found = if after.len() == text.len() { "" } else { at };
            Tuple::from([before, found, after].map(Value::from)).into()
        }
        "split" | "rsplit" => {
            let (sep, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
            let sep = sep.or(named.get("sep")?).filter(|sep| !sep.is_none());
            let most = most.or(named.get("maxsplit")?);
            named.assert_all_used()?;
            let most = most.and_then(|most| usize::try_from(most).ok());
            let (Some(most), true) = (most, name == "rsplit") else {
                // From the left, or at every separator.
                let args = [sep.unwrap_or(Value::from(())), most.map_or(Value::from(()), Value::from)];
                return pycompat::unknown_method_callback(state, &text.into(), "split", &args).map(Some);
            };
            let sep =
                sep.as_ref().map(|sep| sep.as_str().ok_or_else(|| invalid("sep must be a string"))).transpose()?;
            rsplit(text, sep, most).into_iter().collect()
        }
        "index" | "rindex" => {
            let find = if name == "index" { "find" } else { "rfind" };
            let at = call(state, &text.into(), find, args)?;
            if at == Value::from(-1) {
                return Err(invalid("substring not found"));
            }
            at
        }
        "find" | "rfind" | "count" | "startswith" | "endswith" if args.len() > 1 => {
            let (what, start, end): (Value, Option<i64>, Option<i64>) = from_args(args)?;
            let (start, part) = slice(text, start, end);
            let found = pycompat::unknown_method_callback(state, &part.into(), name, &[what])?;
            match i64::try_from(found.clone()) {
                Ok(at) if name.ends_with("find") && at >= 0 => Value::from(at + start as i64),
                _ => found,
            }
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let (len, fill) = (text.chars().count(), fill.unwrap_or(' '));
            let room = width.saturating_sub(len);
            let left = match name {
                "ljust" => 0,
                "rjust" => room,
                // An odd extra space goes where Python puts it.
                _ => room / 2 + (room & width & 1),
            };
            padded(state, text, fill, left, room - left)?.into()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let digits = text.trim_start_matches(['+', '-']);
            let sign = &text[..usize::from(digits.len() < text.len())];
            let room = width.saturating_sub(text.chars().count());
            format!("{sign}{}", padded(state, &text[sign.len()..], '0', room, 0)?).into()
        }
        "casefold" => {
            let () = from_args(args)?;
            text.to_lowercase().into()
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            text.chars().map(swap).collect::<String>().into()
        }
        "isdecimal" => {
            let () = from_args(args)?;
            (!text.is_empty() && text.chars().all(|c| c.is_numeric())).into()
        }
        "istitle" => {
            let () = from_args(args)?;
            let is_cased = text.chars().any(char::is_alphabetic);
            (is_cased && minijinja::filters::title(text.into()) == text).into()
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

/// Returns an error for an empty separator, as Python does.
fn split_at<T>(parts: T, at: &str) -> Result<T, Error> {
    if at.is_empty() { Err(invalid("empty separator")) } else { Ok(parts) }
}

/// Splits at the last `most` separators, or at runs of white space if `sep` is None.
fn rsplit(text: &str, sep: Option<&str>, most: usize) -> Vec<Value> {
    let mut parts = Vec::new();
    let mut rest = if sep.is_none() { text.trim_end() } else { text };
    while parts.len() < most {
        let split = match sep {
            Some(sep) => rest.rsplit_once(sep),
            None => rest.rsplit_once(char::is_whitespace),
        };
        let Some((before, part)) = split else { break };
        parts.push(part);
        rest = if sep.is_none() { before.trim_end() } else { before };
    }
    if sep.is_some() || !rest.is_empty() {
        parts.push(rest);
    }
    parts.into_iter().rev().map(Value::from).collect()
}

/// Returns the number of characters before `text[start:end]`, and that slice.
fn slice(text: &str, start: Option<i64>, end: Option<i64>) -> (usize, &str) {
    let len = text.chars().count();
    let place = |at: i64| if at < 0 { len.saturating_sub(at.unsigned_abs() as usize) } else { len.min(at as usize) };
    let start = start.map_or(0, place);
    let end = end.map_or(len, place).max(start);
    let byte = |place| text.char_indices().nth(place).map_or(text.len(), |(at, _)| at);
    (start, &text[byte(start)..byte(end)])
}

fn padded(state: &State, text: &str, fill: char, left: usize, right: usize) -> Result<String, Error> {
    /// Bytes of padding for each unit of fuel.
    const BYTES_OF_FUEL: usize = 64;
    state.consume_fuel(((left + right) / BYTES_OF_FUEL) as u64)?;
    let pad = |n| std::iter::repeat_n(fill, n);
    Ok(pad(left).chain(text.chars()).chain(pad(right)).collect())
}

fn invalid(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}
