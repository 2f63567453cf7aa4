//! Where the patterns of tokenizers cut texts: `fixtures/patterns.py` has cut them with the package tokenizers, as engines have it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

use serde_json::{Value, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

fn ends(cutter: &PreTokenizerWrapper, text: &str) -> Vec<u64> {
    let mut cut = PreTokenizedString::from(text);
    cutter.pre_tokenize(&mut cut).unwrap();
    let splits = cut.get_splits(OffsetReferential::Original, OffsetType::Char);
    splits.into_iter().map(|(_, (_, end), _)| end as u64).collect()
}

/// Another library of patterns than the engines' cut texts with a long s, with marks, or of new letters elsewhere: their tokens were others.
#[test]
fn patterns_cut_texts_as_those_of_engines_do() {
    let mut lines =
        include_str!("fixtures/patterns.jsonl").lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let texts = lines.next().unwrap()["texts"].clone();
    let texts: Vec<&str> = texts.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let mut differing = Vec::new();
    for line in lines {
        let split =
            json!({"type": "Split", "pattern": {"Regex": line["pattern"]}, "behavior": "Isolated", "invert": false});
        let cutter: PreTokenizerWrapper = serde_json::from_value(split).unwrap();
        for (text, due) in texts.iter().zip(line["ends"].as_array().unwrap()) {
            let got = ends(&cutter, text);
            if json!(got) != *due {
                differing.push(format!("{}: {text:?}: {got:?}, not {due}", line["family"]));
            }
        }
    }
    assert!(differing.is_empty(), "{} differ:\n{}", differing.len(), differing.join("\n"));
}
