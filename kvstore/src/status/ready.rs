//! The status as `/readyz` shows it: whether new work is taken, and how each tier does.

use kvstore_proto::v1::StatusResponse;
use serde_json::{Map, Value as Json, json};

use super::field::Readiness;
use super::{Node, Value, json};

/// The body of the answer.
pub(crate) fn ready(status: &StatusResponse) -> Json {
    let root = Node::of(status);
    let serves = |node: &Node<'_>| shown(node, node.text("state") == "SERVING");
    let host = root.nodes("host").first();
    let fits = |host: &Node<'_>| shown(host, host.number("bytes_mapped") <= host.number("bytes_max"));
    json!({
        "state": root.text("state"),
        "tiers": {
            "host": host.map(fits),
            "nvme": root.nodes("nvme").first().map(|nvme| nvme.nodes("volumes").iter().map(serves).collect::<Vec<_>>()),
            "object": root.nodes("object").first().map(serves),
        }
    })
}

fn shown(node: &Node<'_>, ready: bool) -> Json {
    let mut object = Map::new();
    object.insert("ready".into(), ready.into());
    for (field, value) in node.iter() {
        let value = match (field.readiness, value) {
            (Readiness::Hidden, _) => continue,
            (Readiness::OrNull, Value::Text("")) => Json::Null,
            (_, value) => json::of_value(value),
        };
        object.insert(field.name.into(), value);
    }
    Json::Object(object)
}
