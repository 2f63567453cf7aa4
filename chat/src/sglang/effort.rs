//! The request's arguments for the template, and what its effort of reasoning adds to them.

use std::sync::Arc;

use super::{Form, NotKnown, given, refused, unsupported};
use crate::jinja::text::is_space;
use crate::value::{Dict, Value};

const TIERS: [&str; 8] = ["none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"];
const YES: [&str; 5] = ["1", "true", "yes", "y", "on"];
/// The largest effort that is a number.
const EFFORT_MAX: f64 = 0.99;

/// All that the template gets beside messages and tools.
pub(super) fn arguments(request: &Dict, form: Form, unsaid: &Dict) -> Result<Dict, NotKnown> {
    let reasoning = request.get("reasoning").and_then(Value::as_dict);
    let mut effort = effort(request, reasoning)?;
    let thinks = match &effort {
        Some(effort) => Some(effort.as_str() != Some("none")),
        None => reasoning.is_some_and(is_enabled).then_some(true),
    };
    let mut own = match given(request, "chat_template_kwargs") {
        Some(Value::Dict(own)) => (**own).clone(),
        None => Dict::new(),
        // It is replaced where the engine writes into it.
        Some(_) if thinks.is_some() => Dict::new(),
        Some(_) => return refused("chat_template_kwargs is no object"),
    };
    if own.contains("chat_template") {
        return refused("chat_template_kwargs has a template of the request's own");
    }
    if let Some(thinks) = thinks {
        for name in ["thinking", "enable_thinking"] {
            if !own.contains(name) {
                own.insert(name, thinks);
            }
        }
    }
    // The route for chats takes it out of there. Null takes it out, too, and says nothing.
    if let Some(said) = own.remove("reasoning_effort").filter(|said| !said.is_none()) {
        effort = Some(said);
    }
    for (name, value) in unsaid.fields() {
        if !own.contains(name) {
            own.insert(Arc::clone(name), value.clone());
        }
    }
    if effort.is_none() {
        effort = own.get("reasoning_effort").filter(|own| !own.is_none()).cloned();
    }
    if form.hunyuan {
        return unsupported("an effort for Hunyuan's template, which depends on how the server was started,");
    }
    if form.low_effort && effort.as_ref().and_then(Value::as_str) == Some("low") && !own.contains("low_effort") {
        return unsupported("a low effort for a template with an argument of its own for it");
    }
    let mut more = Dict::new();
    if let Some(effort) = effort {
        more.insert("reasoning_effort", effort);
    }
    more.extend(own.fields());
    Ok(more)
}

/// Under either of its two names.
fn effort(request: &Dict, reasoning: Option<&Dict>) -> Result<Option<Value>, NotKnown> {
    let nested = reasoning.and_then(|of| given(of, "effort").or_else(|| given(of, "reasoning_effort")));
    let Some(effort) = nested.or_else(|| given(request, "reasoning_effort")) else { return Ok(None) };
    let number = match effort {
        Value::Str(word) if TIERS.contains(&&**word) => return Ok(Some(effort.clone())),
        Value::Str(_) => return unsupported("an effort of reasoning that is another text"),
        Value::Int(int) => int.small().map(|int| int as f64),
        Value::Float(float) => Some(*float),
        _ => None,
    };
    match number.filter(|number| (0.0..=EFFORT_MAX).contains(number)) {
        Some(number) => Ok(Some(number.into())),
        None => refused("reasoning_effort is none of those there are"),
    }
}

fn is_enabled(reasoning: &Dict) -> bool {
    match given(reasoning, "enabled").or_else(|| reasoning.get("enable")) {
        Some(Value::Str(word)) => YES.contains(&&*word.trim_matches(is_space).to_lowercase()),
        Some(other) => other.truthy(),
        None => false,
    }
}
