use serde_json::json;

use super::*;

fn template(source: &str) -> Result<ChatTemplate> {
    let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"});
    ChatTemplate::new(Path::new("tokenizer_config.json"), source, tokens.as_object().unwrap().clone())
}

fn render(source: &str) -> Result<String> {
    let messages = [ChatMessage::new("user", "Is 1 < 2?"), ChatMessage::new("assistant", " Yes. ")];
    template(source)?.render(&messages, true)
}

#[test]
fn templates_of_known_models() {
    let chatml = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                  '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let expected =
        "<|im_start|>user\nIs 1 < 2?<|im_end|>\n<|im_start|>assistant\n Yes. <|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(render(chatml).unwrap(), expected);
    let llama2 = "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + \
                  ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";
    assert_eq!(render(llama2).unwrap(), "<s>[INST] Is 1 < 2? [/INST] Yes. </s>");
}

#[test]
fn whitespace_and_values_are_as_in_python() {
    let check = |source: &str, expected: &str| assert_eq!(render(source).unwrap(), expected, "{source}");
    check("  {% if true %}\nx\n  {% endif %}\ny", "x\ny");
    check("{{ true }} {{ none }} {{ undefined_name }}|", "True None |");
    check("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "Is 1 < 2?"}"#);
    check("{{ [1, 'ä'] | tojson }}", r#"[1, "ä"]"#);
    check("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}");
    check("{{ tools is none }}{% if tools %}x{% endif %}", "True");
    check("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "assistant");
    check("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2");
    check("{{ messages[-1]['content'].split('.')[0].lstrip() }}", "Yes");
    check("{{ 'a-b'.replace('-', '+').upper() }}{{ messages[1:] | length }}", "A+B1");
    check("a {%- generation -%} b {%- endgeneration %} c", "ab c");
    check("{% generation %}\nx\n{% endgeneration %}\n", "x\n");
}

#[test]
fn time_is_formatted() {
    // 2024-02-29 13:05:09 UTC, a Thursday.
    let now = UNIX_EPOCH + Duration::from_secs(1_709_211_909);
    assert_eq!(strftime(now, "%d %b %Y").unwrap(), "29 Feb 2024");
    assert_eq!(
        strftime(now, "%A, %B %d; %Y-%m-%d %H:%M:%S %I %p %j %y %a %%").unwrap(),
        "Thursday, February 29; 2024-02-29 13:05:09 01 PM 060 24 Thu %"
    );
    assert_eq!(strftime(UNIX_EPOCH, "%Y-%m-%d %A %j").unwrap(), "1970-01-01 Thursday 001");
    assert_eq!(
        strftime(UNIX_EPOCH + Duration::from_secs(86_400 * 365), "%F").unwrap_err().detail(),
        Some("strftime_now does not know the directive '%F'")
    );
    let t = template("{{ strftime_now('%Y') }}").unwrap();
    assert_eq!(t.render_at(&[], false, &Map::new(), now).unwrap(), "2024");
}

#[test]
fn failures_are_errors() {
    let check = |source: &str, expected: &str| {
        let error = render(source).unwrap_err().to_string();
        assert!(error.starts_with("tokenizer_config.json: chat template: ") && error.contains(expected), "{error}");
    };
    check("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate");
    check("{% if %}", "line 1");
    check("{{ messages.nothing.deeper }}", "undefined");
    check("{{ 'x'.no_such_method() }}", "no_such_method");
    check("{% for i in range(100000) %}{% for j in range(100000) %}{{ j }}{% endfor %}{% endfor %}", "fuel");
    check("{{ 'x' * 10000000000 }}", "too large");
}

#[test]
fn more_variables_can_be_given() {
    let t = template("{% if enable_thinking %}think{% else %}answer{% endif %}").unwrap();
    let variables = json!({"enable_thinking": true});
    assert_eq!(t.render(&[], false).unwrap(), "answer");
    assert_eq!(t.render_with(&[], false, variables.as_object().unwrap()).unwrap(), "think");
}
