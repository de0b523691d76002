//! A terminal's screen, as far as linechat-client makes use of one: text, and the few control
//! sequences that it sends. A sequence that is not known here shows as text, so that a test fails.

use std::mem;

#[derive(Default)]
struct Row {
    /// What is in each column; nothing in the second one of a wide character.
    cells: Vec<String>,
    /// Goes on in the next row.
    wraps: bool,
}

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
        Screen {
            columns,
            rows: vec![Row::default()],
            row: 0,
            column: 0,
            saved: (0, 0),
            does_wrap: true,
            finished: 0,
            pending: Vec::new(),
        }
    }

    /// Shows these bytes. Returns the lines that the cursor has left behind above it, however many
    /// rows each takes; what is typed stands below them.
    pub fn print(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = [mem::take(&mut self.pending), bytes.to_vec()].concat();
        let whole = whole_part(&bytes);
        self.pending = bytes.split_off(whole);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let mut rest = text.as_str();
        while let Some(character) = rest.chars().next() {
            rest = match sequence(rest) {
                Some((parameters, function)) => {
                    self.control(parameters, function);
                    &rest[2 + parameters.len() + function.len_utf8()..]
                }
                None if rest.starts_with("\x1b7") || rest.starts_with("\x1b8") => {
                    match &rest[1..2] {
                        "7" => self.saved = (self.row, self.column),
                        _ => (self.row, self.column) = self.saved,
                    }
                    &rest[2..]
                }
                None => {
                    self.character(character);
                    &rest[character.len_utf8()..]
                }
            };
        }
        self.hand_out()
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

    /// Gives the window another width. The line with the cursor is folded anew, as most terminals do.
    pub fn resize(&mut self, columns: usize) {
        self.columns = columns;
        let cells = mem::take(&mut self.rows[self.row].cells);
        let mut rows: Vec<Row> =
            cells.chunks(columns).map(|cells| Row { cells: cells.to_vec(), wraps: true }).collect();
        match rows.last_mut() {
            Some(last) => last.wraps = false,
            None => rows.push(Row::default()),
        }
        let at = self.row;
        self.row += self.column / columns;
        self.column %= columns;
        while at + rows.len() <= self.row {
            rows.push(Row::default());
        }
        self.rows.splice(at..=at, rows);
    }

    fn character(&mut self, character: char) {
        match character {
            '\r' => self.column = 0,
            '\n' => self.move_down(),
            '\x07' => {}
            _ => self.put(character),
        }
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

    /// A control sequence: `ESC [ parameters function`.
    fn control(&mut self, parameters: &str, function: char) {
        match (parameters, function) {
            (_, 'm') | ("?2004", 'h' | 'l') => {}
            ("?7", 'h') => self.does_wrap = true,
            ("?7", 'l') => self.does_wrap = false,
            ("", 'J') => {
                self.rows[self.row].cells.truncate(self.column);
                self.rows[self.row].wraps = false;
                self.rows.truncate(self.row + 1);
            }
            // To the top of the window, above which is what has been handed out.
            ("", 'H') => (self.row, self.column) = (self.finished, 0),
            (_, 'A') => self.row = self.row.saturating_sub(parameters.parse().unwrap_or(1)),
            _ => format!("ESC[{parameters}{function}").chars().for_each(|c| self.put(c)),
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

/// How much of `bytes` is whole characters and control sequences.
fn whole_part(bytes: &[u8]) -> usize {
    let characters = match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len(),
    };
    let escape = bytes[..characters].iter().rposition(|&byte| byte == 0x1b);
    let is_cut = |start: &usize| match &bytes[*start..characters] {
        [_] => true,
        [_, b'[', rest @ ..] => !rest.iter().any(|byte| matches!(byte, 0x40..=0x7e)),
        _ => false,
    };
    escape.filter(is_cut).unwrap_or(characters)
}

/// The parameters and the function of the control sequence that `text` starts with.
fn sequence(text: &str) -> Option<(&str, char)> {
    let text = text.strip_prefix("\x1b[")?;
    let end = text.find(|c: char| matches!(c, '\x40'..='\x7e'))?;
    Some((&text[..end], text[end..].chars().next()?))
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
