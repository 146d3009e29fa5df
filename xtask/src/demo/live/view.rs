//! What is known of a migration, as a picture of a few lines.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize as _};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, LineGauge, Paragraph, Sparkline, Widget as _};

use super::state::{Place, State};

/// Lines of the picture.
pub const HEIGHT: u16 = 17;

/// Narrower than this it says nothing; wider it only gets emptier.
pub const WIDTHS: std::ops::RangeInclusive<u16> = 64..=110;

/// Columns of the names of rows.
const NAMES: u16 = 14;

const OURS: Color = Color::Cyan;

/// Draws it.
pub fn draw(state: &State, width: u16) -> Buffer {
    let area = Rect::new(0, 0, width, HEIGHT);
    let mut buffer = Buffer::empty(area);
    let [title, hosts, pass, _, classes, _, rate, database, passes, words] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(4),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(3),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(2),
        Constraint::Length(2),
    ])
    .areas(area);
    let head = format!("{}  {:.0} s  {}", state.title, state.seconds, state.phase);
    Paragraph::new(head.bold()).render(title, &mut buffer);
    draw_hosts(state, hosts, &mut buffer);
    draw_pass(state, pass, &mut buffer);
    draw_classes(state, classes, &mut buffer);
    draw_rate(state, rate, &mut buffer);
    draw_database(state, database, &mut buffer);
    draw_passes(state, passes, &mut buffer);
    let lines: Vec<Line<'_>> = state.lines.iter().map(|line| Line::from(line.as_str()).dim()).collect();
    Paragraph::new(lines).render(words, &mut buffer);
    buffer
}

fn draw_hosts(state: &State, area: Rect, buffer: &mut Buffer) {
    let [from, between, to] =
        Layout::horizontal([Constraint::Length(24), Constraint::Fill(1), Constraint::Length(24)]).areas(area);
    let ways = state.source.unwrap_or_default().ways;
    let window = state.source.map_or(0, |source| source.window_pages >> 8);
    let about = |place| match (place, state.source) {
        (Place::Source, Some(_)) => format!("{window} MiB in the window"),
        (Place::Target, Some(_)) => format!("{} from its disk", ways.accepted),
        _ => String::new(),
    };
    for (place, name, area) in [(Place::Source, &state.hosts[0], from), (Place::Target, &state.hosts[1], to)]
    {
        let guest = if state.place == place { "■ db1" } else { "" };
        let block = Block::bordered().border_type(BorderType::Rounded).title(format!(" {name} "));
        Paragraph::new(vec![Line::from(guest.fg(Color::Green).bold()), Line::from(about(place))])
            .block(block)
            .render(area, buffer);
    }
    let arrow = match state.place {
        Place::Source => format!("{}▶", "─".repeat(between.width.saturating_sub(3).into())),
        Place::Target => String::new(),
    };
    let rate = state.rates.last().copied().unwrap_or(0) as f64 / 1e6;
    let lines =
        [String::new(), format!("{rate:.1} MB/s"), arrow, format!("{:.1} MB", state.wire_bytes as f64 / 1e6)];
    Paragraph::new(lines.map(Line::from).to_vec()).centered().render(between, buffer);
}

fn named(name: &str, area: Rect, buffer: &mut Buffer) -> Rect {
    let [label, rest] = Layout::horizontal([Constraint::Length(NAMES), Constraint::Fill(1)]).areas(area);
    Paragraph::new(name).render(label, buffer);
    rest
}

fn draw_pass(state: &State, area: Rect, buffer: &mut Buffer) {
    let name = state.passes.last().map_or_else(|| "pass".to_owned(), |pass| format!("pass {}", pass.number));
    let rest = named(&name, area, buffer);
    let (done, total) = state.done;
    let share = if total == 0 { 0.0 } else { (done as f64 / total as f64).clamp(0.0, 1.0) };
    let left = state.remaining.as_ref().map(ToString::to_string).unwrap_or_default();
    let [gauge, words] = Layout::horizontal([Constraint::Fill(1), Constraint::Length(24)]).areas(rest);
    LineGauge::default()
        .ratio(share)
        .label(if total == 0 { "     ".to_owned() } else { format!("{:>3.0} %", share * 100.0) })
        .filled_symbol("█")
        .unfilled_symbol("░")
        .filled_style(Style::new().fg(OURS))
        .render(gauge, buffer);
    Paragraph::new(format!("  {left}")).render(words, buffer);
}

fn draw_classes(state: &State, area: Rect, buffer: &mut Buffer) {
    let rows = Layout::vertical([Constraint::Length(1); 3]).split(area);
    let Some(source) = state.source else {
        let rest = named("pages", rows[0], buffer);
        Paragraph::new("the stock helper does not tell what they are").dim().render(rest, buffer);
        return;
    };
    let ways = source.ways;
    let classes = [
        ("by reference", ways.referenced, OURS),
        ("zero", ways.zero, Color::Gray),
        ("whole", ways.whole(), Color::Yellow),
    ];
    let most = classes.iter().map(|(_, pages, _)| *pages).max().unwrap_or(0).max(1);
    for ((name, pages, colour), row) in classes.into_iter().zip(rows.iter()) {
        let rest = named(name, *row, buffer);
        let room = rest.width.saturating_sub(24);
        let length = (u128::from(pages) * u128::from(room)).div_ceil(u128::from(most)) as usize;
        let more = if name == "by reference" && ways.refused > 0 {
            format!(", {} refused", ways.refused)
        } else {
            String::new()
        };
        let spans = [
            Span::from("█".repeat(length)).fg(colour),
            Span::from(format!("{}{pages}{more}", if length == 0 { "" } else { " " })),
        ];
        Paragraph::new(Line::from(spans.to_vec())).render(rest, buffer);
    }
}

/// The newest of a curve that there is room for, and what it is now.
fn draw_curve(name: &str, curve: &[u64], words: String, colour: Color, area: Rect, buffer: &mut Buffer) {
    let rest = named(name, area, buffer);
    let [line, label] = Layout::horizontal([Constraint::Fill(1), Constraint::Length(24)]).areas(rest);
    let newest = &curve[curve.len().saturating_sub(line.width.into())..];
    Sparkline::default().data(newest).style(Style::new().fg(colour)).render(line, buffer);
    Paragraph::new(format!("  {words}")).render(label, buffer);
}

fn draw_rate(state: &State, area: Rect, buffer: &mut Buffer) {
    let most = state.rates.iter().copied().max().unwrap_or(0) as f64 / 1e6;
    draw_curve("network", &state.rates, format!("{most:.1} MB/s at most"), OURS, area, buffer);
}

fn draw_database(state: &State, area: Rect, buffer: &mut Buffer) {
    match &state.transactions {
        Some((total, steps)) => {
            draw_curve("database", steps, format!("{total} transactions"), Color::Green, area, buffer);
        }
        None => {
            let rest = named("database", area, buffer);
            Paragraph::new("idle, its pool warm").dim().render(rest, buffer);
        }
    }
}

fn draw_passes(state: &State, area: Rect, buffer: &mut Buffer) {
    let rest = named("passes", area, buffer);
    // As many of the newest as there is room for, the newest at the end of the last line.
    let mut lines = vec![String::new()];
    for pass in state.passes.iter().rev() {
        let (number, seconds) = (pass.number, pass.seconds);
        let one = match pass.pages {
            None => format!("{number}: soon over"),
            Some(0) => format!("{number}: the last, {seconds:.0} s"),
            Some(pages) => format!("{number}: {pages} pages, {seconds:.0} s"),
        };
        let has_room = lines.len() < rest.height.into();
        match lines.last_mut() {
            Some(line) if line.is_empty() => *line = one,
            Some(line) if line.len() + 3 + one.len() <= rest.width.into() => {
                *line = format!("{one}   {line}")
            }
            _ if has_room => lines.push(one),
            _ => break,
        }
    }
    lines.reverse();
    Paragraph::new(lines.into_iter().map(Line::from).collect::<Vec<_>>()).render(rest, buffer);
}

/// A picture's lines, as a terminal shows them; without colours where these are not wanted.
pub fn lines(buffer: &Buffer, colours: bool) -> Vec<String> {
    let area = buffer.area;
    (area.top()..area.bottom())
        .map(|y| {
            let (mut line, mut style) = (String::new(), (Color::Reset, Modifier::empty()));
            for x in area.left()..area.right() {
                let cell = &buffer[(x, y)];
                let wanted = (cell.fg, cell.modifier);
                if colours && wanted != style {
                    style = wanted;
                    line += &sgr(style);
                }
                line += cell.symbol();
            }
            let mut line = line.trim_end().to_owned();
            if colours {
                line += "\x1b[0m";
            }
            line
        })
        .collect()
}

/// "Select graphic rendition" (ECMA-48, 8.3.117).
fn sgr((colour, modifier): (Color, Modifier)) -> String {
    let mut codes = String::from("\x1b[0");
    for (bit, code) in [(Modifier::BOLD, ";1"), (Modifier::DIM, ";2")] {
        if modifier.contains(bit) {
            codes += code;
        }
    }
    codes += match colour {
        Color::Cyan => ";36",
        Color::Green => ";32",
        Color::Yellow => ";33",
        Color::Gray => ";37",
        _ => "",
    };
    codes + "m"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(state: &State, width: u16) -> String {
        lines(&draw(state, width), false).join("\n")
    }

    #[test]
    fn hosts_passes_classes_and_throughput_are_in_it() {
        let mut state = State::new("with Poolskip", ["source", "target"]);
        for line in
            include_str!("../files/progress.jsonl").lines().take_while(|line| !line.contains("\"summary\""))
        {
            state.line(line);
        }
        (0..20).for_each(|n| state.committed(n * n));
        for width in [*WIDTHS.start(), 80, *WIDTHS.end()] {
            let picture = text(&state, width);
            for word in [
                "source",
                "target",
                "■ db1",
                "▶",
                "pass ",
                "by reference",
                "zero",
                "whole",
                "network",
                "361 transactions",
                "5: 1181 pages, ",
                "6: the last, ",
                "the guest is paused",
            ] {
                assert!(picture.contains(word), "no {word:?} in {width} columns:\n{picture}");
            }
            assert!(picture.lines().all(|line| line.chars().count() <= width.into()), "{picture}");
        }
    }

    #[test]
    fn a_guest_that_has_arrived_is_in_the_other_box() {
        let mut state = State::new("", ["source", "target"]);
        let column = |state: &State| {
            let picture = text(state, 80);
            let line = picture.lines().find(|line| line.contains("■ db1")).unwrap().to_owned();
            line.chars().position(|c| c == '■').unwrap()
        };
        assert!(column(&state) < 24);
        state.line(r#"{"event":"summary","summary":{}}"#);
        assert!(column(&state) > 50);
    }

    #[test]
    fn what_is_not_known_is_said() {
        let picture = text(&State::new("", ["a", "b"]), 80);
        assert!(picture.contains("does not tell") && picture.contains("idle"), "{picture}");
    }

    #[test]
    fn colours_are_only_where_they_are_wanted() {
        let buffer = draw(&State::new("t", ["a", "b"]), 80);
        assert!(!lines(&buffer, false).concat().contains('\x1b'));
        assert!(lines(&buffer, true).concat().contains("\x1b[0;1;32m■"));
    }
}
