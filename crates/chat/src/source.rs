//! Rewrites a template's source where minijinja differs from transformers' Jinja.

use super::methods::MODULO;

const BYTE_ORDER_MARK: char = '\u{feff}';

/// Maximum number of `%` operators in one chain of factors. Later ones stay, which limits the nesting of calls.
const MAX_MODULO: usize = 64;
/// Maximum depth of brackets. Deeper ones are copied, and minijinja rejects them.
const MAX_DEPTH: usize = 100;

/// Keywords, which separate operands.
const KEYWORDS: &[&str] = &[
    "and", "call", "do", "elif", "else", "filter", "for", "if", "in", "include", "is", "not", "or", "print", "set",
    "with",
];

/// Returns a source that minijinja renders as transformers renders `source`:
///
/// - drops a byte-order mark and ends lines in `\n`, as Jinja reads them;
/// - replaces `{% generation %}`, which marks the text that a model is trained on, by `{% with %}`, which has the same
///   scope;
/// - replaces `a % b` by a call of [`MODULO`], because the operator also formats strings.
///
/// Comments, raw blocks and strings do not change.
pub(super) fn adapt(source: &str) -> String {
    let source = source.strip_prefix(BYTE_ORDER_MARK).unwrap_or(source).replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        let tag = &rest[at..];
        let len = match tag.get(1..2) {
            Some("#") => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some("%") if is_tag(tag, "raw") => end_of_raw(tag),
            Some("%") => {
                rest = rewrite(tag, "%}", &mut out);
                continue;
            }
            Some("{") => {
                rest = rewrite(tag, "}}", &mut out);
                continue;
            }
            _ => 1,
        };
        out.push_str(&tag[..len]);
        rest = &tag[len..];
    }
    out + rest
}

/// Returns true if `tag`, which begins with `{%`, has this name.
fn is_tag(tag: &str, name: &str) -> bool {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_ascii_start();
    let Some(rest) = inner.strip_prefix(name) else { return false };
    let rest = rest.trim_ascii_start();
    rest.strip_prefix(['-', '+']).unwrap_or(rest).starts_with("%}")
}

/// Returns the number of bytes before the tag that ends a raw block.
fn end_of_raw(block: &str) -> usize {
    let ends = block.match_indices("{%").map(|(at, _)| at);
    ends.into_iter().find(|&at| is_tag(&block[at..], "endraw")).unwrap_or(block.len())
}

/// Appends a tag or an expression that ends in `end`, rewritten. Returns the source after it.
fn rewrite<'a>(tag: &'a str, end: &str, out: &mut String) -> &'a str {
    let start = 2 + usize::from(tag[2..].starts_with(['-', '+']));
    let Some(Inside { tokens, tail, rest }) = lex(&tag[start..], end) else {
        // The end is missing: minijinja reports that.
        out.push_str(tag);
        return "";
    };
    out.push_str(&tag[..start]);
    match &tokens[..] {
        [Token { space, text: name @ ("generation" | "endgeneration"), .. }] if end == "%}" => {
            out.push_str(space);
            out.push_str(&name.replace("generation", "with"));
        }
        tokens if tokens.iter().any(|token| token.kind == Kind::Modulo) => {
            let mut tokens = Rewriter { tokens, at: 0 };
            while tokens.at < tokens.tokens.len() {
                tokens.expression(0, out);
                // An unmatched closing bracket: minijinja reports it.
                tokens.copy(out);
            }
        }
        tokens => tokens.iter().for_each(|token| token.write(out)),
    }
    out.push_str(tail);
    rest
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A name, a number or a string.
    Operand,
    Open,
    Close,
    /// `.` and `|`: the next token belongs to the operand before.
    Link,
    Sign,
    /// `*`, `/`, `//` and `**`.
    Factor,
    Modulo,
    /// Operators that bind less tightly than factors.
    Other,
}

struct Token<'a> {
    /// White space before the token.
    space: &'a str,
    text: &'a str,
    kind: Kind,
}

impl Token<'_> {
    fn write(&self, out: &mut String) {
        out.push_str(self.space);
        out.push_str(self.text);
    }
}

struct Inside<'a> {
    tokens: Vec<Token<'a>>,
    /// White space, then the end of the tag.
    tail: &'a str,
    /// The source after the tag.
    rest: &'a str,
}

/// Splits a tag into tokens up to `end`. Finds the end as minijinja does: outside of strings and brackets.
fn lex<'a>(inner: &'a str, end: &str) -> Option<Inside<'a>> {
    let mut tokens: Vec<Token> = Vec::new();
    let (mut at, mut depth) = (0, 0);
    loop {
        let rest = inner[at..].trim_ascii_start();
        let space = &inner[at..inner.len() - rest.len()];
        if depth == 0 && rest.strip_prefix(['-', '+']).unwrap_or(rest).starts_with(end) {
            let len = end.len() + usize::from(!rest.starts_with(end));
            let (tail, rest) = inner[at..].split_at(space.len() + len);
            return Some(Inside { tokens, tail, rest });
        }
        let first = rest.chars().next()?;
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let len = match first {
            '\'' | '"' => string_len(rest)?,
            c if is_word(c) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            _ if ["//", "**", "==", "!=", ">=", "<="].iter().any(|op| rest.starts_with(op)) => 2,
            c => c.len_utf8(),
        };
        let text = &rest[..len];
        let follows_link = tokens.last().is_some_and(|token| token.kind == Kind::Link);
        let kind = match text {
            "(" | "[" | "{" => Kind::Open,
            ")" | "]" | "}" => Kind::Close,
            "." | "|" => Kind::Link,
            "+" | "-" => Kind::Sign,
            "*" | "/" | "//" | "**" => Kind::Factor,
            "%" => Kind::Modulo,
            word if KEYWORDS.contains(&word) && !follows_link => Kind::Other,
            _ if is_word(first) || matches!(first, '\'' | '"') => Kind::Operand,
            _ => Kind::Other,
        };
        depth += i32::from(kind == Kind::Open) - i32::from(kind == Kind::Close);
        tokens.push(Token { space, text, kind });
        at += space.len() + len;
    }
}

/// Returns the length in bytes of the string literal that `text` begins with.
fn string_len(text: &str) -> Option<usize> {
    let quote = text.as_bytes()[0];
    let mut is_escaped = false;
    for (i, &byte) in text.as_bytes().iter().enumerate().skip(1) {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            byte if byte == quote => return Some(i + 1),
            _ => {}
        }
    }
    None
}

struct Rewriter<'a> {
    tokens: &'a [Token<'a>],
    at: usize,
}

impl Rewriter<'_> {
    fn kind(&self) -> Option<Kind> {
        self.tokens.get(self.at).map(|token| token.kind)
    }

    fn copy(&mut self, out: &mut String) {
        if let Some(token) = self.tokens.get(self.at) {
            token.write(out);
        }
        self.at += 1;
    }

    /// Appends the tokens before the next closing bracket.
    fn expression(&mut self, depth: usize, out: &mut String) {
        // Start of the factors that a `%` takes as its left operand.
        let mut chain = out.len();
        let mut modulos = 0;
        let mut is_operand = false;
        while let Some(kind) = self.kind() {
            let is_modulo = kind == Kind::Modulo && is_operand && modulos < MAX_MODULO;
            match kind {
                Kind::Close => return,
                Kind::Open => self.group(depth, out),
                _ if is_modulo => {
                    modulos += 1;
                    self.at += 1;
                    let left = out.split_off(chain);
                    *out += &format!(" {MODULO}({left},");
                    self.operand(depth, out);
                    out.push(')');
                }
                _ => self.copy(out),
            }
            if kind == Kind::Other || (kind == Kind::Sign && is_operand) {
                (chain, modulos) = (out.len(), 0);
            }
            is_operand = is_modulo || matches!(kind, Kind::Operand | Kind::Open);
        }
    }

    /// Appends brackets with their content.
    fn group(&mut self, depth: usize, out: &mut String) {
        self.copy(out);
        if depth == MAX_DEPTH {
            while self.at < self.tokens.len() {
                self.copy(out);
            }
            return;
        }
        self.expression(depth + 1, out);
        self.copy(out);
    }

    /// Appends the right operand of a `%`: signs, a value, and the links that belong to it.
    fn operand(&mut self, depth: usize, out: &mut String) {
        while self.kind() == Some(Kind::Sign) {
            self.copy(out);
        }
        while let Some(kind) = self.kind() {
            let is_power = kind == Kind::Factor && self.tokens[self.at].text == "**";
            match kind {
                Kind::Open => self.group(depth, out),
                Kind::Operand | Kind::Link => self.copy(out),
                Kind::Factor if is_power => {
                    self.copy(out);
                    return self.operand(depth, out);
                }
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_a_scope() {
        for (source, adapted) in [
            ("{% generation %}a{% endgeneration %}", "{% with %}a{% endwith %}"),
            ("{%- generation -%} a {%+ endgeneration+%}", "{%- with -%} a {%+ endwith+%}"),
            ("{%generation%}a{%-endgeneration\n-%}", "{%with%}a{%-endwith\n-%}"),
        ] {
            assert_eq!(adapt(source), adapted);
        }
    }

    #[test]
    fn text_that_only_looks_like_a_tag_stays() {
        for source in [
            "{# {% generation %} 1 % 2 #}",
            "{% raw %}{% generation %}{{ 1 % 2 }}{% endraw %}",
            "{{ '{% generation %} 1 % 2' }}",
            "generation {% set generation = 1 %} { % generation %",
            "{{ \"%}\" }}{{ '\\'% 2' }}",
            "{% if generation %}",
            "{{ 'open",
        ] {
            assert_eq!(adapt(source), source);
        }
    }

    #[test]
    fn line_ends_are_those_that_jinja_reads() {
        assert_eq!(adapt("\u{feff}a\r\n{{ 'b\rc' }}\r\n"), "a\n{{ 'b\nc' }}\n");
    }

    #[test]
    fn a_modulo_takes_the_factors_before_it_and_one_value_after_it() {
        for (source, adapted) in [
            ("{{ a % 2 == 0 }}", "{{ @( a, 2) == 0 }}"),
            ("{{ 1 + a.b[0] * -c % -d.e(1)|f * 3 }}", "{{ 1 + @( a.b[0] * -c, -d.e(1)|f) * 3 }}"),
            ("{{ a % b % c }}", "{{ @( @( a, b), c) }}"),
            ("{{ f(a % b, ('x' % y)) }}", "{{ f( @(a, b), ( @('x', y))) }}"),
            ("{%- if not(x)%2 %}", "{%- if not @((x),2) %}"),
            ("{% set s = '%s' ~ '%d' % (1, 2) -%}", "{% set s = '%s' ~ @( '%d', (1, 2)) -%}"),
            ("{{ {'a': 1 % 2} }}", "{{ {'a': @( 1, 2)} }}"),
            ("{{ a % 2 ** 3 - 1 % 2 }}", "{{ @( a, 2 ** 3) - @( 1, 2) }}"),
        ] {
            assert_eq!(adapt(source), adapted.replace('@', MODULO), "{source}");
        }
    }

    #[test]
    fn hostile_nesting_is_copied() {
        let deep = format!("{{{{ {}1 % 2 }}}}", "(".repeat(100_000));
        // never closed, so no tag
        assert_eq!(adapt(&deep), deep);
        let deep = format!("{{{{ {}1 % 2{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
        assert_eq!(adapt(&deep), deep);
        let long = format!("{{{{ 1{} }}}}", " % 1".repeat(100_000));
        assert_eq!(adapt(&long).matches(MODULO).count(), MAX_MODULO);
    }
}
