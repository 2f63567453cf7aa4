//! The status as the command line's JSON.

use kvstore_proto::v1::StatusResponse;
use serde_json::{Map, Value as Json, json};

use super::{Node, Value};

/// All fields that have a place in the JSON.
pub fn to_json(status: &StatusResponse) -> Json {
    of_node(&Node::of(status))
}

fn of_node(node: &Node<'_>) -> Json {
    let mut object = Map::new();
    for (field, value) in node.iter() {
        if let Some(place) = field.json {
            put(&mut object, place, of_value(value));
        }
    }
    Json::Object(object)
}

/// Puts a value where `place` says, and makes the objects on the way there.
fn put(object: &mut Map<String, Json>, place: &str, value: Json) {
    match place.split_once('.') {
        None => _ = object.insert(place.into(), value),
        Some((name, rest)) => {
            let inner = object.entry(name).or_insert_with(|| Json::Object(Map::new()));
            if let Json::Object(inner) = inner {
                put(inner, rest, value);
            }
        }
    }
}

/// A value without its unit.
pub(super) fn of_value(value: &Value<'_>) -> Json {
    match value {
        Value::Number(number) => json!(number),
        Value::Ratio(ratio) => json!(ratio),
        Value::Text(text) => json!(text),
        Value::Texts(texts) => json!(texts),
        Value::One(node) => node.as_ref().map_or(Json::Null, of_node),
        Value::Many(nodes) => nodes.iter().map(of_node).collect(),
    }
}
