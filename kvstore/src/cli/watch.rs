//! `kvstore status --watch`: the status as a live view.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use kvstore_client::{Client, v1};
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Gauge, Paragraph, Sparkline};

use super::output::bytes;
use crate::status::{Node, fill};

/// Points of a flow that are shown.
const HISTORY: usize = 240;

/// One look at the daemon, and when.
struct Look {
    at: Instant,
    status: v1::StatusResponse,
}

/// What is shown.
#[derive(Default)]
struct View {
    last: Option<Look>,
    rates: Rates,
    put: VecDeque<u64>,
    get: VecDeque<u64>,
    trouble: Option<String>,
}

/// What happened between two looks, a second.
#[derive(Clone, Default)]
struct Rates {
    before: v1::StatusResponse,
    now: v1::StatusResponse,
    seconds: f64,
}

impl Rates {
    /// Of a count, by its name in the status.
    fn of(&self, name: &str) -> u64 {
        let count = |status| Node::of(status).number(name);
        // A daemon that restarted counts anew.
        (count(&self.now).saturating_sub(count(&self.before)) as f64 / self.seconds.max(0.001)) as u64
    }

    fn hits_percent(&self) -> f64 {
        let (hits, misses) = (self.of("traffic.get_hits"), self.of("traffic.get_misses"));
        if hits + misses == 0 { 0.0 } else { 100.0 * hits as f64 / (hits + misses) as f64 }
    }
}

impl View {
    fn look(&mut self, status: Result<v1::StatusResponse, kvstore_client::Error>) {
        let status = match status {
            Ok(status) => status,
            Err(error) => {
                self.trouble = Some(error.to_string());
                return;
            }
        };
        self.trouble = None;
        let now = Look { at: Instant::now(), status };
        if let Some(last) = &self.last {
            let seconds = now.at.duration_since(last.at).as_secs_f64();
            self.rates = Rates { before: last.status.clone(), now: now.status.clone(), seconds };
            for (flow, name) in [(&mut self.put, "traffic.put_bytes"), (&mut self.get, "traffic.get_bytes")] {
                flow.push_back(self.rates.of(name));
                flow.drain(..flow.len().saturating_sub(HISTORY));
            }
        }
        self.last = Some(now);
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let Some(look) = &self.last else {
            let text = self.trouble.clone().unwrap_or_else(|| "waiting for the daemon ...".into());
            return frame.render_widget(Paragraph::new(text), frame.area());
        };
        let root = Node::of(&look.status);
        let volumes = root.nodes("nvme").first().map_or(&[][..], |nvme| nvme.nodes("volumes"));
        let object = if look.status.object.is_some() { 3 } else { 0 };
        let [head, host, nvme, bucket, flows, put, get, foot] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(3),
            Constraint::Length(volumes.len() as u16 * 3),
            Constraint::Length(object),
            Constraint::Length(8),
            Constraint::Min(3),
            Constraint::Min(3),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        draw_head(frame, head, &root);
        for memory in root.nodes("host") {
            let used = fill("{bytes_used} of {bytes_max}, {blocks} blocks", memory);
            gauge(frame, host, "host", (memory.number("bytes_used"), memory.number("bytes_max")), used);
        }
        let areas = Layout::vertical(vec![Constraint::Length(3); volumes.len()]).split(nvme);
        for (volume, area) in volumes.iter().zip(areas.iter()) {
            let used = fill(VOLUME, volume);
            let sizes = (volume.number("disk_bytes"), volume.number("bytes_max"));
            gauge(frame, *area, &fill("nvme {path} {state}", volume), sizes, used);
        }
        for object in root.nodes("object") {
            let sizes = (object.number("backlog_bytes"), object.number("backlog_bytes_max"));
            gauge(frame, bucket, &fill("object {url} {state} {reason}", object), sizes, fill(OBJECT, object));
        }
        frame.render_widget(Paragraph::new(self.flows()).block(Block::bordered().title("per second")), flows);
        flow(frame, put, "put", &self.put, Color::Green);
        flow(frame, get, "get", &self.get, Color::Cyan);
        let foot_line = match &self.trouble {
            Some(trouble) => Line::from(trouble.clone()).red(),
            None => Line::from("press q to quit").dim(),
        };
        frame.render_widget(foot_line, foot);
    }

    fn flows(&self) -> Vec<Line<'static>> {
        let rate = |name: &str| self.rates.of(name);
        let amount = |name: &str| bytes(rate(name));
        let line = |name: &'static str, value: String| {
            Line::from(vec![Span::from(format!("{name:<10}")).dim(), Span::from(value)])
        };
        let both = |written: &str, read: &str| format!("{:>12} written, {} read", amount(written), amount(read));
        let (hits, lookups) = (self.rates.hits_percent(), rate("traffic.lookups"));
        vec![
            line("put", format!("{:>12}    get {:>12}", amount("traffic.put_bytes"), amount("traffic.get_bytes"))),
            line("hits", format!("{hits:>11.1}%    look-ups {lookups:>7}")),
            line("evicted", format!("{:>12}    busy {:>11}", rate("host.evicted"), rate("traffic.busy"))),
            line("nvme", both("nvme.volumes.device_written_bytes", "nvme.volumes.read_bytes")),
            line("object", both("object.written_bytes", "object.read_bytes")),
            line("requests", format!("{:>12} to the object store", rate("object.requests"))),
        ]
    }
}

const VOLUME: &str = "{disk_bytes} of {bytes_max}, {blocks} blocks; queued {queued_demand} demand, {queued_prefetch} prefetch, \
                      {queued_writeback} write-back";
const OBJECT: &str = "{backlog_bytes} of {backlog_bytes_max} to upload, oldest waiting {backlog_age_ms:seconds} s; \
                      {writes} writing, {reads} reading";

fn draw_head(frame: &mut Frame<'_>, area: Rect, root: &Node<'_>) {
    let state = root.text("state").to_owned();
    let state = if state == "SERVING" { state.green() } else { state.yellow() };
    let head = Line::from(vec![
        Span::from(fill("kvstore {version} ", root)).bold(),
        state,
        Span::from(fill("  up {uptime_ms}  {listeners}", root)),
    ]);
    frame.render_widget(head, area);
}

fn gauge(frame: &mut Frame<'_>, area: Rect, title: &str, (used, most): (u64, u64), label: String) {
    let ratio = if most == 0 { 0.0 } else { (used as f64 / most as f64).clamp(0.0, 1.0) };
    let colour = if ratio > 0.95 { Color::Yellow } else { Color::Blue };
    let gauge = Gauge::default()
        .block(Block::bordered().title(title.to_owned()))
        .gauge_style(Style::default().fg(colour))
        .ratio(ratio)
        .label(label);
    frame.render_widget(gauge, area);
}

fn flow(frame: &mut Frame<'_>, area: Rect, title: &str, flow: &VecDeque<u64>, colour: Color) {
    let width = usize::from(area.width.saturating_sub(2));
    let shown: Vec<u64> = flow.iter().skip(flow.len().saturating_sub(width)).copied().collect();
    let most = shown.iter().max().copied().unwrap_or(0);
    let title = format!("{title}, at most {}/s", bytes(most));
    let line =
        Sparkline::default().block(Block::bordered().title(title)).data(shown).style(Style::default().fg(colour));
    frame.render_widget(line, area);
}

/// Shows the status anew every `every`, until q, Esc or Ctrl-C.
pub(super) async fn watch(client: &Client, every: Duration) -> anyhow::Result<()> {
    use std::io::IsTerminal as _;
    anyhow::ensure!(std::io::stdout().is_terminal(), "--watch needs a terminal; programs can use --json instead");
    let mut terminal = ratatui::try_init()?;
    let outcome = watch_in(&mut terminal, client, every).await;
    ratatui::restore();
    outcome
}

async fn watch_in(terminal: &mut ratatui::DefaultTerminal, client: &Client, every: Duration) -> anyhow::Result<()> {
    let mut view = View::default();
    loop {
        view.look(client.status().await);
        let until = Instant::now() + every;
        while Instant::now() < until {
            terminal.draw(|frame| view.draw(frame))?;
            let left = until.saturating_duration_since(Instant::now());
            // The terminal's events are read where blocking is allowed.
            if tokio::task::spawn_blocking(move || ends(left)).await?? {
                return Ok(());
            }
        }
    }
}

/// Waits for a key or a new size; true for a key that ends it.
fn ends(within: Duration) -> std::io::Result<bool> {
    if !event::poll(within)? {
        return Ok(false);
    }
    let Event::Key(key) = event::read()? else { return Ok(false) };
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    Ok(key.kind == KeyEventKind::Press && (control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn status(put_bytes: u64) -> v1::StatusResponse {
        v1::StatusResponse {
            version: "9.9".into(),
            state: "SERVING".into(),
            host: Some(v1::HostTierStatus { bytes_used: 3 << 30, bytes_max: 4 << 30, ..Default::default() }),
            traffic: Some(v1::Traffic { put_bytes, get_hits: put_bytes / 4, get_misses: 0, ..Default::default() }),
            nvme: Some(v1::NvmeTierStatus {
                volumes: vec![v1::VolumeStatus {
                    path: "/mnt/a".into(),
                    state: "SERVING".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            object: Some(v1::ObjectTierStatus { url: "s3://b/p".into(), state: "AWAY".into(), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn every_tier_and_its_flows_are_shown() {
        let mut view = View::default();
        view.look(Ok(status(0)));
        let rates = Rates { before: status(0), now: status(8 << 20), seconds: 2.0 };
        assert_eq!((rates.of("traffic.put_bytes"), rates.hits_percent()), (4 << 20, 100.0));
        let restarted = Rates { before: status(5), now: status(1), seconds: 1.0 };
        assert_eq!(restarted.of("traffic.put_bytes"), 0, "a daemon that restarted");
        view.rates = rates;
        view.look(Err(kvstore_client::Error::Unavailable("gone".into())));
        for (width, height) in [(100, 40), (20, 5)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| view.draw(frame)).unwrap();
            if width == 100 {
                let text: String = terminal.backend().buffer().content().iter().map(|cell| cell.symbol()).collect();
                for shown in ["kvstore 9.9", "3.0 GiB of 4.0 GiB", "/mnt/a", "s3://b/p AWAY", "4.0 MiB", "gone"] {
                    assert!(text.contains(shown), "{shown}: {text}");
                }
            }
        }
    }
}
