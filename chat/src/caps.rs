//! Bounds of what a template and a request may take, each with its reason. A template is the operator's, and may be wrong; a request is
//! anybody's.

/// Bytes of a template: real ones have some 20,000.
pub const SOURCE_BYTES_MAX: usize = 4 << 20;
/// Blocks and brackets within each other in a template, so that reading it needs no more than some 100 KiB of stack.
pub const SOURCE_DEPTH_MAX: usize = 100;
/// Expressions within each other: a sum of so many parts is one, and sums are longer than brackets are deep.
pub const HEIGHT_MAX: usize = 250;
/// Steps of one text: a conversation of a thousand messages takes some 100,000. So many take about a second.
pub const STEPS_MAX: u64 = 10_000_000;
/// Bytes of a text: a request has no more, and a template adds little.
pub const TEXT_BYTES_MAX: usize = 64 << 20;
/// Bytes of all values that a rendering makes, whether they are still there or not: a conversation of a million tokens has 4 MiB, and
/// templates make a few copies of it.
pub const MADE_BYTES_MAX: usize = 256 << 20;
/// Characters or items that one operator makes.
pub const MADE_MAX: usize = 16 << 20;
/// Items of a text that is gone through, or split: each takes some 50 bytes.
pub const PARTS_MAX: usize = 1 << 20;
/// Statements, expressions and calls within each other while a template runs: what may be within each other in its source, a few times.
pub const DEPTH_MAX: usize = 1000;
/// Calls of macros within each other: templates go through schemas so.
pub const CALLS_MAX: usize = 200;
/// Bytes of the stack that a template may take: threads have 2 MiB, and what waits above it needs some.
pub const STACK_BYTES_MAX: usize = 1 << 20;
/// Values within each other: more than JSON may have, and few enough to be compared and dropped on a stack.
pub const VALUES_DEPTH_MAX: usize = 300;
/// Items of a range: the sandbox allows no more.
pub const RANGE_MAX: usize = 100_000;
/// Digits and characters that a format may ask for: tables have some 10.
pub const WIDTH_MAX: usize = 1000;
/// Lists and maps within each other in JSON: Python refuses some 1,000, and nobody sends 100.
pub const JSON_DEPTH_MAX: usize = 200;
/// Digits of a whole number in JSON: Python refuses more.
pub const DIGITS_MAX: usize = 4300;
