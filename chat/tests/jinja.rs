//! Templates, and what transformers makes of them: `fixtures/generate.py` wrote it down.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use kvstore_chat::jinja::{Clock, RenderError, Template};
use kvstore_chat::json;
use kvstore_chat::vllm::Form;

/// 2024-07-26 10:05:09 UTC.
const AT: i64 = 1_721_988_309;

fn differences(path: &str) -> (usize, Vec<String>, Vec<String>) {
    let cases = std::fs::read_to_string(path).unwrap();
    let (mut count, mut different, mut not_done) = (0, Vec::new(), Vec::new());
    for line in cases.lines() {
        count += 1;
        let case = json::parse(line.as_bytes()).unwrap();
        let source = case.get("template").and_then(|text| text.as_str()).unwrap();
        let context = case.get("context").and_then(|context| context.as_dict()).unwrap();
        let due = case.get("text").and_then(|text| text.as_str());
        let template = match Template::parse(source) {
            Ok(template) => template,
            Err(error) => {
                if error.to_string().ends_with("is not done here") {
                    not_done.push(format!("{source:?}: {error}"));
                } else if due.is_some() {
                    different.push(format!("{source:?}: {error}, not {due:?}"));
                }
                continue;
            }
        };
        match (template.render(context, &Clock::fixed(AT)), due) {
            (Err(RenderError::Unsupported(_)), None) => {}
            (Err(RenderError::Unsupported(what)), Some(_)) => not_done.push(format!("{source:?}: {what}")),
            (Ok(text), Some(due)) if text == due => {}
            (Err(RenderError::Raised(what)), None)
                if case.get("raised").and_then(|raised| raised.as_str()) == Some(&what) => {}
            (Err(_), None) if case.get("raised").is_none() => {}
            (got, _) => different.push(format!("{source:?}:\n  {got:?}\n  {due:?} is due")),
        }
    }
    (count, different, not_done)
}

#[test]
fn texts_are_those_of_transformers() {
    let (count, different, not_done) = differences(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/jinja.jsonl"));
    assert!(count > 300, "{count} cases");
    assert!(different.is_empty(), "{} of {count} differ:\n{}", different.len(), different.join("\n"));
    println!("{count} cases, {} of what is not done here:\n{}", not_done.len(), not_done.join("\n"));
}

/// Cases that are not kept: `KVSTORE_JINJA_CASES=file cargo test -p kvstore-chat -- --ignored`.
#[test]
#[ignore = "it needs cases of installed packages"]
fn texts_of_real_templates_are_those_of_transformers() {
    let Ok(path) = std::env::var("KVSTORE_JINJA_CASES") else { return };
    let (count, different, not_done) = differences(&path);
    assert!(different.is_empty(), "{} of {count} differ:\n{}", different.len(), different.join("\n"));
    println!("{count} cases, {} of what is not done here:\n{}", not_done.len(), not_done.join("\n"));
}

fn refused(source: &str) -> String {
    match Template::parse(source) {
        Err(error) => error.to_string(),
        Ok(template) => template.render(&Default::default(), &Clock::fixed(AT)).unwrap_err().to_string(),
    }
}

#[test]
fn no_template_goes_on_for_ever() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(x=[]) %}{% for a in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{% for a in range(9999999) %}{% endfor %}",
        // Values within each other by the arguments of macros, which would need more stack than there is when they go.
        "{% macro m(x) %}{{ m([[[[[[[[[[x]]]]]]]]]]) }}{% endmacro %}{{ m(1) }}",
        // Bytes: of one text, of one operator, and of all values together.
        "{% set s = 'x' * 9999999 %}{{ ([s] * 9999) | join }}",
        "{% set s = 'x' * 9999999 %}{{ s.join([s] * 9999) }}",
        "{% set s = 'x' * 9999999 %}{{ ([s] * 9999) | tojson }}",
        "{% set s = 'x' * 9999999 %}{{ [s] * 9999 }}",
        "{% set s = 'x' * 9999999 %}{{ ('%s' * 8) % (s, s, s, s, s, s, s, s) }}",
        "{% set s = 'x' * 9999999 %}{{ s ~ s ~ s ~ s ~ s ~ s ~ s ~ s ~ s ~ s }}",
        "{% set s = '\t' * 9999999 %}{{ s.expandtabs(1000) }}",
        "{% set s = 'x\n' * 999999 %}{{ s | indent(1000) }}{{ s | indent(1000, blank=true) }}",
        "{% set s = 'x' * 999999 %}{{ s.replace('x', s) }}",
        "{% set s = 'x,' * 9999999 %}{{ s.split(',') | length }}",
        "{% set s = 'x' * 9999999 %}{{ s | list | length }}",
        "{% set ns = namespace(x=[]) %}{% set s = 'x' * 9999999 %}{% for a in range(9999) %}{% set ns.x = ns.x + [s ~ a] %}{% endfor %}",
        // Time: comparing is deep, and so is looking for depth.
        "{% set l = [range(99999) | list] * 9 %}{% for a in range(99999) %}{% if l == [[l]] or l != l[:] %}x{% endif %}{% endfor %}",
        "{% set l = [range(99999) | list] * 9 %}{% for a in range(99999) %}{% set x = l %}{% endfor %}",
    ] {
        let why = refused(source);
        assert!(why.starts_with("too many") || why.contains("too big") || why.contains("too long"), "{source}: {why}");
    }
    for source in [
        format!("{{{{ {}1{} }}}}", "(".repeat(9999), ")".repeat(9999)),
        format!("{{{{ 1{} }}}}", " + 1".repeat(9999)),
        "{% if 1 %}".repeat(9999),
    ] {
        assert!(refused(&source).contains("too deep"));
    }
    let calls =
        format!("{{% macro m() %}}{{{{ {}m(){} }}}}{{% endmacro %}}{{{{ m() }}}}", "[".repeat(30), "]".repeat(30));
    assert!(refused(&calls).starts_with("too many"));
}

#[test]
fn the_form_of_contents_is_that_of_vllm() {
    let path = std::env::var("KVSTORE_JINJA_FORMS");
    let path = path.unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/forms.jsonl").to_owned());
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let case = json::parse(line.as_bytes()).unwrap();
        let text = |key: &str| case.get(key).and_then(|text| text.as_str()).unwrap();
        // What is not done here has no form either.
        if let Ok(template) = Template::parse(text("template")) {
            assert_eq!(format!("{:?}", template.facts().content).to_lowercase(), text("form"), "{line}");
        }
    }
}

#[test]
fn templates_that_walk_through_content_are_known_by_their_source() {
    let in_loop = |inside: &str| format!("{{%- for message in messages -%}}{inside}{{% endfor %}}");
    for (source, parts) in [
        (in_loop("{% for part in message.content %}{{ part.text }}{% endfor %}"), true),
        (in_loop("{%- for part in message['content'] | list if part.type == 'text' -%}{% endfor %}"), true),
        (in_loop("{% for part in message.content[1:] %}{% endfor %}"), true),
        (in_loop("{{ message.content }}"), false),
        (in_loop("{% for call in message.tool_calls %}{% endfor %}"), false),
        (in_loop("{% for part in other.content %}{% endfor %}"), false),
        (in_loop("{% for part in (message.content or []) %}{% endfor %}"), false),
        (in_loop("{# {% for part in message.content %} #}{% raw %}{% for part in message.content %}{% endraw %}"), false),
        ("{% set rest = messages[1:] %}{% for m in rest %}{% for p in m.content %}{% endfor %}{% endfor %}".into(), true),
        ("{% for m in rest %}{% for p in m.content %}{% endfor %}{% endfor %}".into(), false),
        ("{% set ns.rest = messages[1:] %}{% for m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}".into(), false),
        ("{% for a, b in messages | list %}{% endfor %}{% for m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}".into(), false),
        ("{% for p in content %}{% endfor %}".into(), true),
        ("{% macro f(content) %}{% for p in content %}{% endfor %}{% endmacro %}{% for m in messages %}{{ m.content }}{% endfor %}".into(), false),
        ("{% macro f(x, content) %}{% for p in content %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(1, m.content) }}{% endfor %}".into(), true),
        ("{% macro f(c) %}{% for p in c %}{% endfor %}{% endmacro %}{% for m in messages %}{{- f(c=m['content']) }}{% endfor %}".into(), true),
        ("{% macro f(c) %}{% for p in c %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.role) }}{% endfor %}".into(), false),
    ] {
        assert_eq!(Form::of(Template::parse(&source).unwrap().facts()).parts, parts, "{source}");
    }
    let developers = |source: &str| Template::parse(source).unwrap().facts().knows_developer;
    assert!(developers("{{ 'developer' }}") && !developers("developer"));
    // No source takes more than its length.
    for odd in ["{%", "{{ 'a", "{% for %}", "{% for x in", "{% macro %}", "{% set %}", "{% set x = %}", "{% raw %}a"] {
        assert!(Template::parse(odd).is_err(), "{odd}");
    }
}

/// The library's sorting may panic where an order contradicts itself.
#[test]
fn what_has_no_order_is_refused() {
    let mixed = "{{ ((range(50) | list) + ['a'] + (range(50) | list)) | sort }}";
    assert!(refused(mixed).contains("not supported"), "{}", refused(mixed));
}
