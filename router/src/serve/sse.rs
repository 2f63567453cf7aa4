//! Server-sent events, as engines stream answers: lines, an empty one after each event. Events come out as the bytes that came in.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};

/// Takes bytes as they come, and gives whole events.
#[derive(Default)]
pub struct Events {
    /// What came last, where nothing was left of what came before it: its events are parts of it.
    fresh: Bytes,
    /// An event whose end is yet to come.
    partial: BytesMut,
    /// Where its last line begins, as far as it was looked through.
    line: usize,
}

/// One event, with the empty line behind it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event(Bytes);

impl Events {
    /// More of the stream.
    pub fn push(&mut self, bytes: Bytes) {
        if self.partial.is_empty() && self.fresh.is_empty() {
            self.fresh = bytes;
        } else {
            self.partial.extend_from_slice(&std::mem::take(&mut self.fresh));
            self.partial.extend_from_slice(&bytes);
        }
    }

    /// Bytes of an event whose end is yet to come, once [`Self::next`] gave all that came whole.
    pub fn partial(&self) -> usize {
        self.partial.len()
    }

    /// The next whole event.
    pub fn next(&mut self) -> Option<Event> {
        if self.partial.is_empty() {
            self.line = 0;
            if let Some(end) = end_of_event(&self.fresh, &mut self.line) {
                return Some(Event(self.fresh.split_to(end)));
            }
            self.partial.extend_from_slice(&std::mem::take(&mut self.fresh));
            return None;
        }
        let end = end_of_event(&self.partial, &mut self.line)?;
        let event = self.partial.split_to(end).freeze();
        // The others are parts of what is left, without a copy.
        self.fresh = std::mem::take(&mut self.partial).freeze();
        self.line = 0;
        Some(Event(event))
    }

    /// What came behind the last whole event.
    pub fn rest(&mut self) -> Bytes {
        let mut rest = std::mem::take(&mut self.partial);
        rest.extend_from_slice(&std::mem::take(&mut self.fresh));
        self.line = 0;
        rest.freeze()
    }
}

/// The end of the first line at or behind `from`, and where the next begins. `None` where it did not end yet: behind a carriage return,
/// a line feed may follow.
fn end_of_line(bytes: &[u8], from: usize) -> Option<(usize, usize)> {
    let rest = bytes.get(from..)?;
    let end = from + rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'))?;
    if bytes.get(end) == Some(&b'\n') {
        return Some((end, end + 1));
    }
    let follows = bytes.get(end + 1)?;
    Some((end, end + 1 + usize::from(*follows == b'\n')))
}

/// Where the first event ends, behind its empty line. `line`: where the first line begins that is not known to be another's.
fn end_of_event(bytes: &[u8], line: &mut usize) -> Option<usize> {
    while let Some((end, next)) = end_of_line(bytes, *line) {
        if end == *line {
            return Some(next);
        }
        *line = next;
    }
    None
}

impl Event {
    /// As it came.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }

    /// Whether it is UTF-8.
    pub fn is_text(&self) -> bool {
        std::str::from_utf8(&self.0).is_ok()
    }

    /// Its data; none where it has no such line: a comment, say. `None`, too, where it is not UTF-8.
    pub fn data(&self) -> Option<Cow<'_, str>> {
        let text = std::str::from_utf8(&self.0).ok()?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut data: Option<Cow<'_, str>> = None;
        let mut at = 0;
        while let Some((end, next)) =
            end_of_line(text.as_bytes(), at).or((at < text.len()).then_some((text.len(), text.len())))
        {
            let line = text.get(at..end).unwrap_or_default();
            at = next;
            let value = match line.strip_prefix("data") {
                Some("") => "",
                Some(rest) => match rest.strip_prefix(':') {
                    Some(value) => value.strip_prefix(' ').unwrap_or(value),
                    None => continue,
                },
                None => continue,
            };
            data = Some(match data {
                None => Cow::Borrowed(value),
                Some(before) => Cow::Owned(format!("{before}\n{value}")),
            });
        }
        data
    }

    /// The event with other data, where its data are one line; otherwise an event of the data alone.
    pub fn with_data(&self, new: &[u8]) -> Bytes {
        let whole = &self.0;
        if let Some(Cow::Borrowed(old)) = self.data() {
            let range = super::json::range_of(whole, old);
            let (before, after) =
                (whole.get(..range.start).unwrap_or_default(), whole.get(range.end..).unwrap_or_default());
            return [before, new, after].concat().into();
        }
        [b"data: ", new, b"\n\n"].concat().into()
    }
}

/// An event of this data.
pub fn event(data: &str) -> Bytes {
    Bytes::from(format!("data: {data}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_of(events: &mut Events) -> Vec<Event> {
        std::iter::from_fn(|| events.next()).collect()
    }

    #[test]
    fn events_come_whole_and_as_they_were_however_they_are_cut() {
        let stream = b"data: {\"a\": 1}\n\n: a comment\n\ndata: one\r\ndata:two\r\n\r\nevent: x\ndata: [DONE]\n\n\nid: 7\rdata\r\rdatum: 3\n\ndata: cut off";
        let datas = [Some("{\"a\": 1}"), None, Some("one\ntwo"), Some("[DONE]"), None, Some(""), None];
        for size in 1..stream.len() {
            let mut events = Events::default();
            let mut all = Vec::new();
            for piece in stream.chunks(size) {
                events.push(Bytes::copy_from_slice(piece));
                all.extend(all_of(&mut events));
            }
            let found: Vec<Option<String>> = all.iter().map(|event| event.data().map(Cow::into_owned)).collect();
            assert_eq!(found, datas.map(|data| data.map(str::to_owned)), "in pieces of {size}");
            let mut bytes: Vec<u8> = all.into_iter().flat_map(Event::into_bytes).collect();
            assert!(stream.starts_with(&bytes));
            bytes.extend(events.rest());
            assert_eq!((bytes.as_slice(), events.partial()), (&stream[..], 0), "in pieces of {size}");
        }
    }

    #[test]
    fn an_event_keeps_all_but_its_data() {
        let one = |text: &'static str| {
            let mut events = Events::default();
            events.push(Bytes::from_static(text.as_bytes()));
            events.next().unwrap()
        };
        assert_eq!(one(": x\r\ndata:{}\r\nid: 3\r\n\r\n").with_data(b"[1]"), ": x\r\ndata:[1]\r\nid: 3\r\n\r\n");
        assert_eq!(one("data: a\ndata: b\n\n").with_data(b"[1]"), "data: [1]\n\n");
        let odd = Event(Bytes::from_static(b"data: \xff\n\n"));
        assert!(!odd.is_text() && odd.data().is_none());
    }
}
