use super::*;
use gvote::llama::ModelParams;

#[path = "../../../tests/common/model.rs"]
mod models;
#[allow(dead_code)] // used by other tests, too
#[path = "../../../src/tests/tiny.rs"]
mod tiny;

fn model() -> Model {
    Model::load(&models::model(), &ModelParams::default(), |_| true).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate {
        source: source.into(),
        bos: "<s>".into(),
        eos: "</s>".into(),
        markers: Markers::of_texts(&["<s>", "</s>", "<|end|>", "</think>"]),
        is_fallback: false,
        values: Map::new(),
        now: None,
        takes_system: OnceLock::new(),
    }
}

/// Vocabularies of both common kinds: byte pairs, and SentencePiece.
fn models() -> [Model; 2] {
    let folder = tempfile::tempdir().unwrap();
    let file = tiny::sentencepiece(folder.path());
    [model(), Model::load(&file, &ModelParams::default(), |_| true).unwrap()]
}

fn user(content: &str) -> Vec<Message> {
    vec![Message::new(Role::User, content)]
}

fn with_system(content: &str) -> Vec<Message> {
    vec![Message::new(Role::System, "Be brief."), Message::new(Role::User, content)]
}

/// Renders one message from the user.
fn text(source: &str, content: &str) -> String {
    template(source).render(&user(content), false).unwrap().text().to_owned()
}

/// Renders an expression.
fn value(expression: &str) -> String {
    text(&format!("{{{{ {expression} }}}}"), "Hello World")
}

#[test]
fn chatml_renders_a_conversation() {
    let template = template(CHATML);
    assert_eq!(
        template.render(&with_system("Hi"), true).unwrap().text(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn an_exception_of_the_template_is_the_error() {
    let error =
        template("{{ raise_exception('roles must alternate') }}").render(&user(""), false).unwrap_err().to_string();
    assert!(error.contains("roles must alternate") && error.lines().count() == 1, "{error}");
}

#[test]
fn generation_tags_do_nothing() {
    for (source, rendered) in [
        ("a {% generation %} b {% endgeneration %} c", "a  b  c"),
        ("a {%- generation -%} b {%- endgeneration -%} c", "abc"),
        ("{% for m in messages %}\n  {% generation %}\n{{ m.content }}\n  {% endgeneration %}\n{% endfor %}\n", "Hi\n"),
        // these tags have their own scope
        ("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}", "1False"),
    ] {
        assert_eq!(text(source, "Hi"), rendered, "{source}");
    }
}

#[test]
fn python_methods_of_strings_work() {
    for (expression, result) in [
        ("messages[0]['content'].removeprefix('Hello ').removesuffix('ld')", "Wor"),
        ("'abc'.removeprefix('x') ~ 'abc'.removesuffix('')", "abcabc"),
        (
            "'a:b:c'.partition(':') ~ 'a:b:c'.rpartition(':') ~ 'a'.partition(':')",
            "('a', ':', 'b:c')('a:b', ':', 'c')('a', '', '')",
        ),
        (
            "'a,b,c'.rsplit(',', 1) ~ 'a b  c '.rsplit(maxsplit=1) ~ 'a,b,c'.split(sep=',', maxsplit=1)",
            "['a,b', 'c']['a b', 'c']['a', 'b,c']",
        ),
        ("'hello'.index('l') ~ 'hello'.rindex('l') ~ 'hello'.find('l', 3) ~ 'hello'.count('l', 0, -2)", "2331"),
        ("'hello'.startswith('llo', 2) and 'hello'.endswith('hel', 0, 3)", "True"),
        ("'ab'.center(5, '*') ~ 'ab'.ljust(3) ~ 'ab'.rjust(3, '.') ~ '-4'.zfill(4)", "**ab*ab .ab-004"),
        ("'aB'.swapcase() ~ 'AB'.casefold() ~ '12'.isdecimal() ~ 'Ab Cd'.istitle()", "AbabTrueTrue"),
        ("['x', 'y'].index('y')", "1"),
        (" '  hi '.strip().upper() ~ ('é' * 3).title()", "HIÉéé"),
    ] {
        assert_eq!(value(expression), result, "{expression}");
    }
    let error = template("{{ 'a'.index('b') }}").render(&user(""), false).unwrap_err().to_string();
    assert!(error.contains("substring not found"), "{error}");
}

#[test]
fn a_percent_sign_formats_strings_and_divides_numbers() {
    for (expression, result) in [
        ("'%s' % messages[0].content", "Hello World"),
        ("'%s is %05.1f, %d%%' % ('it', 2.5, 7)", "it is 002.5, 7%"),
        ("'%(a)s' % {'a': 1} ~ '%s' % [1, 2]", "1[1, 2]"),
        ("7 % 4 ~ -7 % 4 ~ 7.5 % 2", "311.5"),
        ("2 * 5 % 3 + 1", "2"),
    ] {
        assert_eq!(value(expression), result, "{expression}");
    }
}

#[test]
fn tests_of_types_answer_as_python_does() {
    assert_eq!(
        value("none is iterable ~ ('a' is sequence) ~ ('a' is iterable) ~ ([] is sequence) ~ (1 is sequence)"),
        "FalseTrueTrueTrueFalse"
    );
}

#[test]
fn tojson_is_that_of_transformers() {
    for (expression, json) in [
        ("'<b> & \\'é\\'' | tojson", r#""<b> & 'é'""#),
        ("messages | tojson", r#"[{"role": "user", "content": "Hello World"}]"#),
        ("{'b': 1, 'a': [1.0, 1e-5, 1e16, none, true]} | tojson", r#"{"b": 1, "a": [1.0, 1e-05, 1e+16, null, true]}"#),
        ("{'b': 1, 'a': {'d': 2, 'c': 3}} | tojson(sort_keys=true)", r#"{"a": {"c": 3, "d": 2}, "b": 1}"#),
        ("{'b': [1, 2]} | tojson(separators=(',', ':'))", r#"{"b":[1,2]}"#),
        ("{'b': [1], 'c': {}} | tojson(indent=2)", "{\n  \"b\": [\n    1\n  ],\n  \"c\": {}\n}"),
        ("'é😀\\t' | tojson(ensure_ascii=true)", r#""\u00e9\ud83d\ude00\t""#),
    ] {
        assert_eq!(value(expression), json, "{expression}");
    }
}

#[test]
fn the_date_is_that_of_the_clock() {
    let mut template = template("{{ strftime_now('%Y-%m-%d') }}{{ strftime_now('|%d %b %Y|%%|%!') }}");
    // noon in UTC, so that it is the same day from Hawaii to Japan
    template.stop_clock(Some(951_825_600));
    assert_eq!(template.render(&user(""), false).unwrap().text(), "2000-02-29|29 Feb 2000|%|%!");
    template.stop_clock(None);
    let today = jiff::ZonedDateTime::now().strftime("%Y-").to_string();
    assert!(template.render(&user(""), false).unwrap().text().starts_with(&today));
}

#[test]
fn values_are_variables_of_the_template() {
    let values = serde_json::json!({"enable_thinking": false, "tools": ["t"], "eos_token": "!", "messages": []});
    let serde_json::Value::Object(values) = values else { unreachable!() };
    let source = "{{ enable_thinking }}{{ tools }}{{ eos_token }}{{ documents is none }}{{ messages | length }}";
    let rendered = template(source).with_values(values).render(&user("Hi"), false).unwrap();
    assert_eq!(rendered.text(), "False['t']!True1");
    assert_eq!(text("{{ tools is none }}{{ enable_thinking is defined }}", ""), "TrueFalse");
}

#[test]
fn line_ends_in_a_template_are_those_of_jinja() {
    assert_eq!(text("\u{feff}{% if true %}\r\na\r\n{% endif %}\r\nb\r\n", ""), "a\nb");
}

#[test]
fn a_template_that_never_ends_is_refused() {
    let source = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}";
    let error = template(source).render(&user(""), false).unwrap_err().to_string();
    assert!(error.contains("fuel"), "{error}");
}

const ROLES: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}";

#[test]
fn a_system_message_that_a_template_refuses_or_ignores_goes_into_the_first_user_message() {
    let refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}";
    let ignores = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}";
    for source in [refuses, ignores] {
        let template = template(&format!("{source}{ROLES}"));
        assert!(!template.takes_system());
        assert_eq!(template.render(&with_system("Hi"), false).unwrap().text(), "[user] Be brief.\n\nHi ");
        assert_eq!(template.render(&user("Hi"), false).unwrap().text(), "[user] Hi ");
    }
    let template = template(ROLES);
    assert!(template.takes_system());
    assert_eq!(template.render(&with_system("Hi"), false).unwrap().text(), "[system] Be brief. [user] Hi ");
}

#[test]
fn a_template_that_fails_without_a_system_message_too_says_its_own_reason() {
    let error = template("{{ raise_exception('never') }}").render(&with_system("Hi"), false).unwrap_err();
    assert!(error.to_string().contains("never"), "{error}");
}

/// Returns the markers in a text: their places and texts.
fn markers_of(template: &ChatTemplate, messages: &[Message]) -> (String, Vec<String>) {
    let rendered = template.render(messages, true).unwrap();
    let markers = rendered.markers().map_or_else(
        || template.markers.find(rendered.text(), &[]).into_iter().map(|(range, _)| range).collect(),
        |ranges| ranges.collect::<Vec<_>>(),
    );
    let text = rendered.text().to_owned();
    let shown = markers.into_iter().map(|range| format!("{}:{}", range.start, &text[range.clone()])).collect();
    (text, shown)
}

#[test]
fn a_marker_in_a_message_is_text() {
    let plain = template("<s>{% for m in messages %}{{ m.content | trim }}<|end|>{% endfor %}");
    for content in
        ["a <|end|> b", "<s>", "<|end|>", " <|end|><|end|> ", "</s", "<|end|", "|end|>", "end", "s><|en", ">"]
    {
        let (text, markers) = markers_of(&plain, &user(content));
        assert_eq!(text, format!("<s>{}<|end|>", content.trim()));
        assert_eq!(markers, ["0:<s>".to_owned(), format!("{}:<|end|>", text.len() - 7)], "{content}");
    }
}

#[test]
fn messages_side_by_side_make_no_marker_together() {
    let joined = template("<{% for m in messages %}{{ m.content }}{% endfor %}>");
    for (one, other) in [("<|en", "d|>"), ("s", ""), ("", "s"), ("<", "s>"), ("/", "s")] {
        let messages = [Message::new(Role::User, one), Message::new(Role::Assistant, other)];
        let (text, markers) = markers_of(&joined, &messages);
        assert_eq!(text, format!("<{one}{other}>"));
        assert!(markers.is_empty(), "{text}: {markers:?}");
    }
}

#[test]
fn private_characters_in_a_message_stay() {
    let content = "\u{f0000}<|end|>\u{f0001}\u{ffffd}<s>";
    let (text, markers) = markers_of(&template("{{ messages[0].content }}<|end|>"), &user(content));
    assert_eq!(text, format!("{content}<|end|>"));
    assert_eq!(markers.len(), 1);
}

#[test]
fn json_quotes_a_marker_as_text() {
    let (text, markers) = markers_of(&template("{{ messages | tojson }}</s>"), &user("<s>\n"));
    assert_eq!(text, r#"[{"role": "user", "content": "<s>\n"}]</s>"#);
    assert_eq!(markers, [format!("{}:</s>", text.len() - 4)]);
}

/// Templates of reasoning models keep only the text after the thoughts.
#[test]
fn a_template_that_looks_for_a_marker_in_a_message_finds_it() {
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% else %}\
                  {{ m.content }}{% endif %}<|end|>{% endfor %}";
    let messages = [
        Message::new(Role::User, "What is </think> or <|end|>?"),
        Message::new(Role::Assistant, "Hm.</think>It is <|end|>."),
    ];
    let (text, markers) = markers_of(&template(source), &messages);
    assert_eq!(text, "What is </think> or <|end|>?<|end|>It is <|end|>.<|end|>");
    assert_eq!(markers, ["28:<|end|>", "49:<|end|>"]);
}

#[test]
fn an_answer_that_is_begun_has_no_markers() {
    let template = template("{{ messages[0].content }}<|end|>");
    let rendered = template.render_answer(&user("Hi"), "<s> No").unwrap();
    assert_eq!(rendered.text(), "Hi<|end|><s> No");
    assert!(rendered.markers().unwrap().eq(std::iter::once(2..9)));
}

/// Texts without markers of their own have the same tokens whether or not they are split at the template's markers.
#[test]
fn cutting_at_markers_makes_the_tokens_that_llama_cpp_makes_of_the_whole() {
    for model in models() {
        let template = ChatTemplate::chatml(&model);
        let bos = model.bos_text();
        for content in ["Hi", "  two\n\n lines <b> ", "ünïcode 日本", "", "1 < 2", "\n", "a\t\tb  c"] {
            for lead in ["", &bos, "\n "] {
                let plain = template.render(&with_system(content), true).unwrap();
                let text = format!("{lead}{}{bos}x", plain.text());
                let whole = Rendered::plain(text.clone()).tokens(&model).unwrap();
                let cut = Rendered::quoting(text.clone(), &[], &template.markers);
                assert_eq!(cut.tokens(&model).unwrap(), whole, "{text:?}");
                let at = text.find(content).unwrap_or(0);
                let [head, tail] = cut.tokens_split(&model, at).unwrap();
                assert_eq!(tail, model.tokenize(&text[at..], false, true).unwrap());
                assert_eq!(head, Rendered::plain(text[..at].to_owned()).tokens(&model).unwrap());
            }
        }
    }
}

#[test]
fn no_token_of_a_message_is_a_control_token() {
    for model in models() {
        let template = ChatTemplate::chatml(&model);
        let control = |content: &str| {
            let tokens = template.render(&user(content), true).unwrap().tokens(&model).unwrap();
            tokens.into_iter().filter(|&token| model.is_control(token)).count()
        };
        let texts: Vec<String> = (0..model.n_vocab() as Token)
            .filter(|&token| model.is_control(token))
            .map(|token| String::from_utf8(model.piece(token, true)).unwrap())
            .collect();
        assert!(texts.len() > 2, "{texts:?}");
        let expected = control("Hi");
        for text in &texts {
            for content in [text.clone(), format!("What is {text} for?{text}{text}"), format!("{text}\n")] {
                assert_eq!(control(&content), expected, "{content:?}");
            }
        }
        assert_eq!(control(&texts.concat()), expected);
    }
}

/// Also as plain text: the pieces of its text are those of the marker.
#[test]
fn pieces_that_make_up_a_marker_are_read_apart() {
    let [_, model] = models();
    let text = "the <|im_end|>user <|im_end|>";
    assert!(model.tokenize(text, false, false).unwrap().iter().any(|&token| model.is_control(token)));
    let tokens = ChatTemplate::chatml(&model).render(&user(text), false).unwrap().tokens(&model).unwrap();
    let control = tokens.iter().filter(|&&token| model.is_control(token)).count();
    assert_eq!(control, usize::from(model.adds_bos()) + 2);
    assert!(model.detokenize(&tokens, true).contains(text), "{}", model.detokenize(&tokens, true));
}

#[test]
fn content_with_markers_comes_back_as_text() {
    let model = model();
    let content = "What does <|im_end|> mean? <|im_start|>system";
    let tokens = ChatTemplate::of(&model).render(&user(content), true).unwrap().tokens(&model).unwrap();
    assert!(model.detokenize(&tokens, true).contains(content));
    assert!(model.detokenize(&tokens, false).contains(content), "none of it is markup");
}

/// Regardless of the text before it, and of whether the tokenizer adds one as well.
#[test]
fn a_prompt_has_one_bos_token() {
    for model in models() {
        let bos = model.tokenize(&model.bos_text(), false, true).unwrap();
        let [bos] = bos[..] else { panic!("{bos:?}") };
        for source in [
            "{{ bos_token }}x",
            "\n{{ bos_token }}x",
            "  \n\n{{ bos_token }}{{ messages[0].content }}",
            "{{ messages[0].content }}",
        ] {
            let template = ChatTemplate::new(&model, source.into());
            for content in ["Hi", &model.bos_text(), "a <|im_end|>"] {
                let tokens = template.render(&user(content), true).unwrap().tokens(&model).unwrap();
                let count = tokens.iter().filter(|&&token| token == bos).count();
                assert_eq!(count, usize::from(model.adds_bos() || source.contains("bos")), "{source:?} {content}");
                assert!(!model.adds_bos() || tokens[0] == bos, "{source:?} {content}");
            }
        }
    }
}
