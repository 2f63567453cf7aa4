//! One figure, one line; and the file that keeps them.

use std::path::Path;
use std::process::Command;

/// A measured value beside its target.
pub struct Figure {
    line: String,
}

impl Figure {
    /// Prints a figure as soon as it is known.
    pub fn new(group: &str, name: &str, value: f64, target: &str) -> Self {
        let line = format!("figure {group}.{name} {} target {target}", shown(value));
        println!("{line}");
        Self { line }
    }

    /// A figure that stands beside others and has no target.
    pub fn note(group: &str, name: &str, value: f64) -> Self {
        Self::new(group, name, value, "none")
    }
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

/// Replaces the group's section of the results file.
pub fn write(path: &Path, group: &str, figures: &[Figure]) -> anyhow::Result<()> {
    let old = std::fs::read_to_string(path).unwrap_or_else(|_| "# Results\n".to_owned());
    let heading = format!("## {group}\n");
    let (before, rest) = old.split_once(&heading).unwrap_or((&old, ""));
    let after = rest.find("\n## ").and_then(|at| rest.get(at + 1..)).unwrap_or("");
    let lines: Vec<&str> = figures.iter().map(|figure| figure.line.as_str()).collect();
    let section = format!(
        "{heading}\n`make bench FIGURES={group}`, {}, {}\n\n```\n{}\n```\n",
        date(),
        machine(),
        lines.join("\n")
    );
    let text = format!("{}\n\n{section}\n{after}", before.trim_end());
    std::fs::write(path, format!("{}\n", text.trim_end()))?;
    Ok(())
}

fn date() -> String {
    let output = Command::new("date").arg("+%Y-%m-%d").output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

/// Cores, processor, memory and kernel.
fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
    let model = model.trim_start_matches(['\t', ' ', ':']);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = kvstore::config::memory_bytes() >> 30;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores of {model}, {memory} GiB, Linux {}, virtual machine", kernel.trim())
}
