//! JSON objects as they were written: their members in order, and changes that leave every other byte as it was.
//!
//! A router that reads a request and writes it anew changes it: keys are sorted, numbers take another form. Schemas and tools are part of
//! a model's prompt, so that is another prompt.

use std::ops::Range;

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::caps;

/// An object's text, and where its members lie in it.
#[derive(Clone, Debug)]
pub struct Object {
    text: Bytes,
    /// In order. A name may come twice: readers take the last, as Python does.
    members: Vec<(String, Range<usize>)>,
}

struct Members<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "a JSON object of at most {} members", caps::REQUEST_MEMBERS_MAX)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry::<&RawValue, &RawValue>()? {
                    if members.len() >= caps::REQUEST_MEMBERS_MAX {
                        return Err(serde::de::Error::invalid_length(members.len() + 1, &self));
                    }
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Form)
    }
}

impl Object {
    /// Reads an object's text; its members' values are not looked into.
    pub fn read(text: Bytes) -> serde_json::Result<Self> {
        let Members(found) = serde_json::from_slice(&text)?;
        // A name that is no text in Unicode is nobody's.
        let name = |key: &RawValue| serde_json::from_str(key.get()).unwrap_or_else(|_| key.get().to_owned());
        let members = found.iter().map(|(key, value)| (name(key), range_of(&text, value.get()))).collect();
        Ok(Self { text, members })
    }

    /// As it was written.
    pub fn bytes(&self) -> &Bytes {
        &self.text
    }

    /// The text of a member's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, range) = self.members.iter().rev().find(|(key, _)| key == name)?;
        std::str::from_utf8(self.text.get(range.clone())?).ok()
    }

    /// A member's value; null where there is none, or where its strings are no Unicode.
    pub fn value(&self, name: &str) -> Value {
        self.get(name).and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null)
    }

    /// Names, in order, and the texts of their values.
    pub fn members(&self) -> impl Iterator<Item = (&str, &str)> {
        let text = |range: &Range<usize>| std::str::from_utf8(self.text.get(range.clone())?).ok();
        self.members.iter().map(move |(name, range)| (name.as_str(), text(range).unwrap_or_default()))
    }

    /// An object of some of its members, in a text of its own.
    pub fn only(&self, is_wanted: impl Fn(&str) -> bool) -> Self {
        let mut text = vec![b'{'];
        let mut members = Vec::new();
        for (name, range) in self.members.iter().filter(|(name, _)| is_wanted(name)) {
            text.extend_from_slice(if members.is_empty() { b"\"" } else { b",\"" });
            text.extend_from_slice(name.as_bytes());
            text.extend_from_slice(b"\":");
            let start = text.len();
            text.extend_from_slice(self.text.get(range.clone()).unwrap_or_default());
            members.push((name.clone(), start..text.len()));
        }
        text.push(b'}');
        Self { text: text.into(), members }
    }

    /// The same object with some members set to these texts: where it has one, its value, otherwise behind all others.
    pub fn with(&self, members: &[(&str, &str)]) -> Bytes {
        let mut changes = Changes::default();
        // An object ends with its brace, and white space.
        let end = self.text.iter().rposition(|byte| *byte == b'}').unwrap_or(self.text.len());
        let mut is_empty = self.members.is_empty();
        for (name, value) in members {
            if let Some((_, old)) = self.members.iter().rev().find(|(key, _)| key == name) {
                changes.replace(old.clone(), *value);
                continue;
            }
            let comma = if is_empty { "" } else { "," };
            changes.replace(end..end, format!("{comma}\"{name}\":{value}"));
            is_empty = false;
        }
        if changes.is_empty() { self.text.clone() } else { changes.apply(&self.text).into() }
    }
}

/// Where `part`, a slice of `whole`, lies in it.
pub fn range_of(whole: &[u8], part: &str) -> Range<usize> {
    let start = (part.as_ptr() as usize).saturating_sub(whole.as_ptr() as usize);
    start..start + part.len()
}

/// A text with some of its parts replaced.
#[derive(Default, Debug)]
pub struct Changes(Vec<(Range<usize>, String)>);

impl Changes {
    /// This part is to be that.
    pub fn replace(&mut self, range: Range<usize>, with: impl Into<String>) {
        self.0.push((range, with.into()));
    }

    /// True without any.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes them. Parts must not overlap.
    pub fn apply(mut self, text: &[u8]) -> Vec<u8> {
        // Stable: what is put at one place stays in its order.
        self.0.sort_by_key(|(range, _)| range.start);
        let mut changed = Vec::with_capacity(text.len() + self.0.iter().map(|(_, with)| with.len()).sum::<usize>());
        let mut at = 0;
        for (range, with) in self.0 {
            changed.extend_from_slice(text.get(at..range.start).unwrap_or_default());
            changed.extend_from_slice(with.as_bytes());
            at = range.end;
        }
        changed.extend_from_slice(text.get(at..).unwrap_or_default());
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Object {
        Object::read(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    #[test]
    fn what_is_not_changed_stays_as_it_was_written() {
        let odd = "\n{ \"z\" : 1.0e+02,\"a\":\"\\ud800 \\u00e4\" , \"n\": 1e400, \"m\": {\"b\":[1 ,2],\"a\":{}},\t\"n\":-0 } \n";
        let with = |text: &str, members: &[(&str, &str)]| String::from_utf8(read(text).with(members).to_vec()).unwrap();
        assert_eq!(with(odd, &[]), odd);
        assert_eq!(with(odd, &[("a", "true")]), odd.replace("\"\\ud800 \\u00e4\"", "true"));
        assert_eq!(with(odd, &[("n", "2")]), odd.replace("-0", "2"), "the last of two counts");
        assert_eq!(with(odd, &[("x", "[3]"), ("y", "4")]), odd.replace("-0 }", "-0 ,\"x\":[3],\"y\":4}"));
        assert_eq!(with("{}", &[("x", "1"), ("y", "2")]), "{\"x\":1,\"y\":2}");
        assert_eq!(with("{ }", &[("x", "1")]), "{ \"x\":1}");
        assert_eq!(with("{\"\\u0078\": 1}", &[("x", "2")]), "{\"\\u0078\": 2}", "the same name, written otherwise");
    }

    #[test]
    fn some_members_make_an_object_of_their_own() {
        let object = read("{\"z\": [1, 2], \"long\": \"xxxxxxxx\", \"a\" : 1.0 }");
        let some = object.only(|name| name != "long");
        assert_eq!(
            (some.bytes().as_ref(), some.get("a"), some.get("long")),
            (&b"{\"z\":[1, 2],\"a\":1.0}"[..], Some("1.0"), None)
        );
        assert_eq!(object.only(|_| false).bytes().as_ref(), b"{}");
    }

    #[test]
    fn members_come_in_order_and_only_of_objects() {
        let object = read("{\"b\": 1, \"a\": [1], \"b\": \"x\"}");
        assert_eq!(object.members().collect::<Vec<_>>(), [("b", "1"), ("a", "[1]"), ("b", "\"x\"")]);
        assert_eq!(
            (object.get("b"), object.get("c"), object.value("a")),
            (Some("\"x\""), None, serde_json::json!([1]))
        );
        assert_eq!(read("{\"a\": \"\\ud800\"}").value("a"), Value::Null, "half a character");
        for wrong in ["[]", "7", "", "{\"a\": 1", "{\"a\": 1} x", "{a: 1}", "{\"a\": nul}"] {
            assert!(Object::read(Bytes::from(wrong)).is_err(), "{wrong}");
        }
        let many = format!("{{{}\"x\":1}}", "\"\":0,".repeat(caps::REQUEST_MEMBERS_MAX));
        assert!(Object::read(Bytes::from(many)).unwrap_err().to_string().contains("at most 1024 members"));
        // Nested without end: nothing recurses.
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(read(&deep).get("a").map(str::len), Some(200_001));
    }
}
