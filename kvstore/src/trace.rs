//! Traces of LLM requests: one JSON object a line, with the fields of the Mooncake project's traces
//! (`timestamp` in ms, `hash_ids`: one id per block of the prompt, equal where a whole prefix is equal).

use std::io::BufRead;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::caps;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRequest {
    /// Milliseconds since the trace began.
    pub timestamp_ms: u64,
    /// The prompt's blocks, in order.
    pub blocks: Vec<u64>,
}

/// What is wrong with a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It can't be read.
    #[error("cannot read the trace {path}: {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why. Part of the message, so not its source: a chain of errors would name it twice.
        cause: std::io::Error,
    },
    /// A line is not a request.
    #[error("{path}, line {line}: {problem}")]
    Line {
        /// Which.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong, and what would be valid.
        problem: String,
    },
    /// It has no request.
    #[error("the trace {0} has no requests")]
    Empty(PathBuf),
}

#[derive(Deserialize)]
struct RawRequest {
    timestamp: serde_json::Value,
    hash_ids: Vec<serde_json::Value>,
}

/// Reads a whole trace.
pub fn read(path: &Path) -> Result<Vec<TraceRequest>, TraceError> {
    let mut requests = Vec::new();
    for_each(path, |request| requests.push(request))?;
    Ok(requests)
}

/// Reads a trace, request by request.
pub fn for_each(path: &Path, mut each: impl FnMut(TraceRequest)) -> Result<(), TraceError> {
    let unreadable = |cause| TraceError::Read { path: path.to_owned(), cause };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut requests = 0;
    for (at, line) in std::io::BufReader::new(file).lines().enumerate() {
        let line = line.map_err(unreadable)?;
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |problem| TraceError::Line { path: path.to_owned(), line: at + 1, problem };
        if requests >= caps::TRACE_REQUESTS_MAX {
            return Err(wrong(format!(
                "the trace has more than {} requests, which is the maximum",
                caps::TRACE_REQUESTS_MAX
            )));
        }
        requests += 1;
        each(parse(&line).map_err(wrong)?);
    }
    if requests == 0 { Err(TraceError::Empty(path.to_owned())) } else { Ok(()) }
}

fn parse(line: &str) -> Result<TraceRequest, String> {
    let raw: RawRequest = serde_json::from_str(line).map_err(|error| {
        let text = error.to_string();
        // serde_json counts lines of its own input, which is one line.
        text.rsplit_once(" at line ").map_or(text.clone(), |(problem, _)| problem.to_owned())
    })?;
    let timestamp_ms = raw
        .timestamp
        .as_f64()
        .filter(|ms| ms.is_finite() && *ms >= 0.0)
        .ok_or_else(|| format!("field timestamp: {} is not a number of milliseconds", raw.timestamp))?;
    let id = |(at, value): (usize, &serde_json::Value)| {
        value.as_u64().ok_or_else(|| format!("field hash_ids[{at}]: {value} is not a whole number from 0 to 2^64 - 1"))
    };
    let blocks: Vec<u64> = raw.hash_ids.iter().enumerate().map(id).collect::<Result<_, _>>()?;
    if blocks.len() > caps::TRACE_BLOCKS_PER_REQUEST_MAX {
        let most = caps::TRACE_BLOCKS_PER_REQUEST_MAX;
        return Err(format!("field hash_ids: the request has {} blocks, but it may have at most {most}", blocks.len()));
    }
    Ok(TraceRequest { timestamp_ms: timestamp_ms as u64, blocks })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<TraceRequest>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn good_lines_are_read() {
        let text = "{\"timestamp\": 5, \"input_length\": 9, \"hash_ids\": [0, 18446744073709551615]}\n\n{\"timestamp\":7.5,\"hash_ids\":[]}\n";
        let requests = read_text(text).unwrap();
        assert_eq!(requests[0], TraceRequest { timestamp_ms: 5, blocks: vec![0, u64::MAX] });
        assert_eq!(requests[1], TraceRequest { timestamp_ms: 7, blocks: vec![] });
    }

    #[test]
    fn mistakes_name_line_and_field() {
        let good = "{\"timestamp\": 5, \"hash_ids\": [1]}\n";
        let cases = [
            ("{\"timestamp\": 5}", "hash_ids"),
            ("{\"hash_ids\": [1]}", "timestamp"),
            ("{\"timestamp\": \"soon\", \"hash_ids\": [1]}", "field timestamp"),
            ("{\"timestamp\": -1, \"hash_ids\": [1]}", "field timestamp"),
            ("{\"timestamp\": 5, \"hash_ids\": [1, -2]}", "field hash_ids[1]"),
            ("{\"timestamp\": 5, \"hash_ids\": 7}", "expected a sequence"),
            ("nonsense", "expected"),
        ];
        for (line, named) in cases {
            let error = read_text(&format!("{good}{line}\n")).unwrap_err();
            assert!(error.contains("line 2") && error.contains(named), "{error}");
        }
        assert!(read_text("\n").unwrap_err().contains("no requests"));
    }
}
