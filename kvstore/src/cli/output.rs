//! Tables for people, JSON for programs.

use comfy_table::{Table, presets};

/// A table of name and value.
pub(super) fn pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in pairs {
        table.add_row([name, value]);
    }
    format!("{}\n", table.trim_fmt())
}

/// Prints a table of name and value.
pub(super) fn print_pairs(of: &[(&str, String)]) {
    print!("{}", pairs(of.iter().map(|(name, value)| (*name, value.as_str()))));
}

/// A table with a head.
pub(super) fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(head.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    format!("{table}\n")
}

/// Prints a table with a head.
pub(super) fn print_table(head: &[&str], rows: Vec<Vec<String>>) {
    print!("{}", table(head, rows));
}

/// Prints a value as JSON.
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Bytes for people.
pub(super) fn bytes(bytes: u64) -> String {
    bytesize::ByteSize(bytes).to_string()
}

/// Bytes as hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hexadecimal digits as bytes.
pub(super) fn parse_hex(text: &str) -> Result<bytes::Bytes, String> {
    let digits: Option<Vec<u8>> = text.chars().map(|digit| digit.to_digit(16).map(|digit| digit as u8)).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2) && !digits.is_empty());
    let digits = digits.ok_or_else(|| format!("{text:?} is not an even number of hexadecimal digits"))?;
    Ok(digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect::<Vec<u8>>().into())
}

/// A block's name as text: what a sequence hash may be.
pub(super) fn parse_name(text: &str) -> Result<String, String> {
    let most = kvstore_tiers::SEQUENCE_HASH_BYTES_MAX;
    match text.len() {
        length if (1..=most).contains(&length) => Ok(text.to_owned()),
        length => Err(format!("a name has 1 to {most} bytes, not {length}: hash longer ones and use --hash")),
    }
}
