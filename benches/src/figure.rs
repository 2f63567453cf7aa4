//! One figure, one line on standard output; `benches/figures.py` keeps the lines.

/// Prints a measured value beside its target as soon as the value is known.
pub fn print(group: &str, name: &str, value: f64, target: &str) {
    println!("figure {group}.{name} {} target {target}", shown(value));
}

/// Prints a figure that has no target.
pub fn note(group: &str, name: &str, value: f64) {
    print(group, name, value, "none");
}

/// Four significant digits or so.
fn shown(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.1}") } else { format!("{value:.4}") }
}

/// The median.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
