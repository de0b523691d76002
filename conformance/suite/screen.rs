//! A terminal's screen, as far as linechat-client makes use of one: text, and the few control
//! sequences that it sends. A sequence that is not known here shows as text, so that a test fails.

use std::mem;

#[derive(Default)]
struct Row {
    /// What is in each column; the second one of a wide character is empty.
    cells: Vec<String>,
    /// Goes on in the next row.
    wraps: bool,
}

#[derive(Default)]
pub struct Screen {
    columns: usize,
    /// From the first that was ever shown; nothing scrolls away.
    rows: Vec<Row>,
    row: usize,
    column: usize,
    saved: (usize, usize),
    does_wrap: bool,
    /// Rows above this one have been handed out by `print` and must not change.
    finished: usize,
    /// The beginning of a control sequence or a character.
    pending: Vec<u8>,
}

impl Screen {
    pub fn new(columns: usize) -> Screen {
        Screen { columns, rows: vec![Row::default()], does_wrap: true, ..Screen::default() }
    }

    /// Shows these bytes. Returns the lines that the cursor has left above it, however many rows each
    /// takes; what is typed stands below them.
    pub fn print(&mut self, bytes: &[u8]) -> Vec<u8> {
        for &byte in bytes {
            self.pending.push(byte);
            let is_cut = match self.pending.as_slice() {
                b"\x1b" | b"\x1b[" => true,
                [0x1b, b'[', .., last] => !matches!(last, 0x40..=0x7e),
                text => std::str::from_utf8(text).is_err_and(|error| error.error_len().is_none()),
            };
            if !is_cut {
                let pending = mem::take(&mut self.pending);
                self.show(&String::from_utf8_lossy(&pending));
            }
        }
        self.hand_out()
    }

    /// Shows a character or a control sequence.
    fn show(&mut self, text: &str) {
        let row = &mut self.rows[self.row];
        match text {
            "\r" => self.column = 0,
            "\n" => self.move_down(),
            "\x07" | "\x1b[?2004h" | "\x1b[?2004l" => {}
            "\x1b7" => self.saved = (self.row, self.column),
            "\x1b8" => (self.row, self.column) = self.saved,
            "\x1b[?7h" => self.does_wrap = true,
            "\x1b[?7l" => self.does_wrap = false,
            "\x1b[J" => {
                row.cells.truncate(self.column);
                row.wraps = false;
                self.rows.truncate(self.row + 1);
            }
            // To the top of the window, above which is what has been handed out.
            "\x1b[H" => (self.row, self.column) = (self.finished, 0),
            _ => match text.strip_prefix("\x1b[") {
                Some(colour) if colour.ends_with('m') => {}
                Some(up) if up.ends_with('A') => {
                    self.row =
                        self.row.saturating_sub(up.trim_end_matches('A').parse().unwrap_or(1));
                }
                Some(other) => format!("ESC[{other}").chars().for_each(|c| self.put(c)),
                None => text.chars().for_each(|c| self.put(c)),
            },
        }
    }

    /// The line that the cursor is in, with `|` in the cursor's place.
    pub fn line_at_cursor(&self) -> String {
        let mut first = self.row;
        while first > 0 && self.rows[first - 1].wraps {
            first -= 1;
        }
        let before = self.rows[first..self.row].iter().flat_map(|row| &row.cells);
        let cells = &self.rows[self.row].cells;
        let (left, right) = cells.split_at(self.column.min(cells.len()));
        let below = self.rows[self.row..].iter().take_while(|row| row.wraps).count();
        let after = self.rows[self.row + 1..].iter().take(below).flat_map(|row| &row.cells);
        let before: String = before.chain(left).cloned().collect();
        let after: String = right.iter().chain(after).cloned().collect();
        format!("{before}|{after}")
    }

    fn put(&mut self, character: char) {
        let width = width(character);
        if self.column + width > self.columns {
            if self.does_wrap {
                self.rows[self.row].wraps = true;
                self.column = 0;
                self.move_down();
            } else {
                self.column = self.columns - width;
            }
        }
        let cells = &mut self.rows[self.row].cells;
        if width == 0 {
            if let Some(cell) = cells.get_mut(..self.column).and_then(|left| left.last_mut()) {
                cell.push(character);
            }
            return;
        }
        if cells.len() < self.column + width {
            cells.resize(self.column + width, " ".to_owned());
        }
        cells[self.column] = character.to_string();
        for cell in &mut cells[self.column + 1..self.column + width] {
            cell.clear();
        }
        self.column += width;
    }

    fn move_down(&mut self) {
        self.row += 1;
        if self.row == self.rows.len() {
            self.rows.push(Row::default());
        }
    }

    fn hand_out(&mut self) -> Vec<u8> {
        let mut lines = Vec::new();
        if self.row < self.finished {
            lines.extend(b"[what was shown is overwritten]\n");
            self.finished = self.row;
        }
        while let Some(length) =
            self.rows[self.finished..self.row].iter().position(|row| !row.wraps)
        {
            let rows = &self.rows[self.finished..=self.finished + length];
            let line: String = rows.iter().flat_map(|row| &row.cells).cloned().collect();
            lines.extend(line.into_bytes());
            lines.push(b'\n');
            self.finished += length + 1;
        }
        lines
    }
}

fn width(character: char) -> usize {
    match character {
        '\u{300}'..='\u{36f}' | '\u{200d}' | '\u{fe0f}' => 0,
        '\u{1100}'..='\u{115f}'
        | '\u{2e80}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{1f300}'..='\u{1faff}' => 2,
        _ => 1,
    }
}
