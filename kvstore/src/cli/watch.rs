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

/// Amounts a second, between two looks.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
struct Rates {
    put_bytes: u64,
    get_bytes: u64,
    lookups: u64,
    hits_percent: f64,
    busy: u64,
    evicted: u64,
    nvme_written: u64,
    nvme_read: u64,
    object_written: u64,
    object_read: u64,
    requests: u64,
}

impl Rates {
    fn between(before: &v1::StatusResponse, now: &v1::StatusResponse, seconds: f64) -> Self {
        let rate = |of: &dyn Fn(&v1::StatusResponse) -> u64| {
            // A daemon that restarted counts anew.
            (of(now).saturating_sub(of(before)) as f64 / seconds.max(0.001)) as u64
        };
        let traffic =
            |of: fn(&v1::Traffic) -> u64| move |status: &v1::StatusResponse| of(&status.traffic.unwrap_or_default());
        let volumes = |of: fn(&v1::VolumeStatus) -> u64| {
            move |status: &v1::StatusResponse| {
                status.nvme.iter().flat_map(|nvme| nvme.volumes.iter()).map(of).sum::<u64>()
            }
        };
        let object = |of: fn(&v1::ObjectTierStatus) -> u64| {
            move |status: &v1::StatusResponse| status.object.as_ref().map_or(0, of)
        };
        let (hits, misses) = (rate(&traffic(|t| t.get_hits)), rate(&traffic(|t| t.get_misses)));
        Self {
            put_bytes: rate(&traffic(|t| t.put_bytes)),
            get_bytes: rate(&traffic(|t| t.get_bytes)),
            lookups: rate(&traffic(|t| t.lookups)),
            hits_percent: if hits + misses == 0 { 0.0 } else { 100.0 * hits as f64 / (hits + misses) as f64 },
            busy: rate(&traffic(|t| t.busy)),
            evicted: rate(&|status| status.host.as_ref().map_or(0, |host| host.evicted)),
            nvme_written: rate(&volumes(|volume| volume.device_written_bytes)),
            nvme_read: rate(&volumes(|volume| volume.read_bytes)),
            object_written: rate(&object(|object| object.written_bytes)),
            object_read: rate(&object(|object| object.read_bytes)),
            requests: rate(&object(|object| object.requests)),
        }
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
            self.rates = Rates::between(&last.status, &now.status, seconds);
            for (flow, value) in [(&mut self.put, self.rates.put_bytes), (&mut self.get, self.rates.get_bytes)] {
                flow.push_back(value);
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
        let status = &look.status;
        let volumes = status.nvme.as_ref().map_or(0, |nvme| nvme.volumes.len()) as u16;
        let object = if status.object.is_some() { 3 } else { 0 };
        let [head, host, nvme, bucket, flows, put, get, foot] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(3),
            Constraint::Length(volumes * 3),
            Constraint::Length(object),
            Constraint::Length(8),
            Constraint::Min(3),
            Constraint::Min(3),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        self.draw_head(frame, head, status);
        let memory = status.host.clone().unwrap_or_default();
        let used = format!("{} of {}, {} blocks", bytes(memory.bytes_used), bytes(memory.bytes_max), memory.blocks);
        gauge(frame, host, "host", (memory.bytes_used, memory.bytes_max), used);
        let areas = Layout::vertical(vec![Constraint::Length(3); usize::from(volumes)]).split(nvme);
        for (volume, area) in status.nvme.iter().flat_map(|nvme| &nvme.volumes).zip(areas.iter()) {
            let used = format!(
                "{} of {}, {} blocks; queued {} demand, {} prefetch, {} write-back",
                bytes(volume.disk_bytes),
                bytes(volume.bytes_max),
                volume.blocks,
                volume.queued_demand,
                volume.queued_prefetch,
                volume.queued_writeback
            );
            let title = format!("nvme {} {}", volume.path, volume.state);
            gauge(frame, *area, &title, (volume.disk_bytes, volume.bytes_max), used);
        }
        if let Some(object) = &status.object {
            let used = format!(
                "{} of {} to upload, oldest waiting {} s; {} writing, {} reading",
                bytes(object.backlog_bytes),
                bytes(object.backlog_bytes_max),
                object.backlog_age_ms / 1000,
                object.writes,
                object.reads
            );
            let title = format!("object {} {} {}", object.url, object.state, object.reason);
            gauge(frame, bucket, &title, (object.backlog_bytes, object.backlog_bytes_max), used);
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

    fn draw_head(&self, frame: &mut Frame<'_>, area: Rect, status: &v1::StatusResponse) {
        let uptime = Duration::from_secs(status.uptime_ms / 1000);
        let state =
            if status.state == "SERVING" { status.state.clone().green() } else { status.state.clone().yellow() };
        let head = Line::from(vec![
            Span::from(format!("kvstore {} ", status.version)).bold(),
            state,
            Span::from(format!("  up {}  {}", humantime::format_duration(uptime), status.listeners.join(", "))),
        ]);
        frame.render_widget(head, area);
    }

    fn flows(&self) -> Vec<Line<'static>> {
        let rates = &self.rates;
        let line = |name: &'static str, value: String| {
            Line::from(vec![Span::from(format!("{name:<10}")).dim(), Span::from(value)])
        };
        vec![
            line("put", format!("{:>12}    get {:>12}", bytes(rates.put_bytes), bytes(rates.get_bytes))),
            line("hits", format!("{:>11.1}%    look-ups {:>7}", rates.hits_percent, rates.lookups)),
            line("evicted", format!("{:>12}    busy {:>11}", rates.evicted, rates.busy)),
            line("nvme", format!("{:>12} written, {} read", bytes(rates.nvme_written), bytes(rates.nvme_read))),
            line("object", format!("{:>12} written, {} read", bytes(rates.object_written), bytes(rates.object_read))),
            line("requests", format!("{:>12} to the object store", rates.requests)),
        ]
    }
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
        let rates = Rates::between(&status(0), &status(8 << 20), 2.0);
        assert_eq!((rates.put_bytes, rates.hits_percent), (4 << 20, 100.0));
        assert_eq!(Rates::between(&status(5), &status(1), 1.0).put_bytes, 0, "a daemon that restarted");
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
