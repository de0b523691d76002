//! linechat-client as a person uses it, through pipes or at a terminal that script(1) holds.

use crate::clients::{Client, Line, Part, Program};
use crate::screen::Screen;
use crate::stage::{Beat, Stage};
use crate::text::{show, side_by_side};
use std::process::Command;
use std::time::Instant;

/// The terminal that linechat-client runs at: script(1) holds it, and `screen` shows it.
pub struct Terminal {
    pub screen: Screen,
    /// Its file, with which its size is set.
    path: String,
    /// Its settings before the client took it over, which it must have again in the end.
    pub settings: String,
    /// The client's process.
    pub process: Option<u32>,
}

/// The steps of linechat-client.
impl Stage<'_> {
    pub fn runs(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        self.starts_client(name, beat, None)
    }

    pub fn runs_at_terminal(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        self.starts_client(name, beat, Some(beat.step.number))
    }

    fn starts_client(
        &mut self,
        name: &str,
        beat: Beat,
        columns: Option<usize>,
    ) -> Result<(), String> {
        self.fence_all_but(name)?;
        let arguments = self.bytes(beat);
        let line = client_process(&String::from_utf8_lossy(&arguments), columns)?;
        self.add_ours(name, line);
        if let Some(columns) = columns {
            self.await_terminal(name, columns)?;
        }
        // Where the suite is the server, this connection is its to serve.
        if let Some(listener) = &self.listener {
            let (socket, _) = listener.accept().map_err(|error| error.to_string())?;
            self.add_ours("server", Line::Socket(socket));
        }
        Ok(())
    }

    fn add_ours(&mut self, name: &str, line: Line) {
        self.clients.push(Client::new(name, Part::Ours, line, "\n"));
        self.is_loose = true;
    }

    /// Waits until linechat-client is about to start at its terminal, even when the run is over:
    /// only then is it known which process to end.
    fn await_terminal(&mut self, name: &str, columns: usize) -> Result<(), String> {
        let client = self.find(name)?;
        let screen = Screen::new(columns);
        let (path, settings) = (String::new(), String::new());
        client.program()?.terminal = Some(Terminal { screen, path, settings, process: None });
        let mut lines = Vec::new();
        while lines.len() < 3 {
            match client.take_line() {
                Some(line) => lines.push(String::from_utf8_lossy(&line).trim().to_owned()),
                None if !client.is_closed && client.read(crate::process::STUCK) => {}
                None => return Err(format!("there is no terminal: {}", client.unread())),
            }
        }
        if let (terminal, [path, settings, process]) = (client.terminal()?, &lines[..]) {
            (terminal.path, terminal.settings) = (path.clone(), settings.clone());
            terminal.process = process.parse().ok();
        }
        Ok(())
    }

    pub fn types(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        self.fence_all_but(name)?;
        let bytes = [self.bytes(beat), b"\n".to_vec()].concat();
        self.find(name)?.send(&bytes);
        Ok(())
    }

    pub fn presses(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        self.fence_all_but(name)?;
        let bytes = self.bytes(beat);
        self.find(name)?.send(&bytes);
        Ok(())
    }

    pub fn ends_input(&mut self, name: &str, _: Beat) -> Result<(), String> {
        self.fence_all_but(name)?;
        self.await_leave();
        self.find(name)?.end_input();
        Ok(())
    }

    pub fn shows(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        self.fence_all_but(name)?;
        let expected = self.pattern(beat);
        let patience = &self.theatre.patience;
        let cause = "what a program shows";
        let limit = patience.with_programs(cause);
        let since = Instant::now();
        loop {
            self.goes_on()?;
            let client = self.find(name)?;
            let line = client.terminal()?.screen.line_at_cursor();
            if expected.matches(line.as_bytes()) {
                return Ok(());
            }
            if client.is_closed || since.elapsed() > limit {
                patience.is_spent_on(cause);
                return Err(side_by_side(&expected.show(), &line));
            }
            client.read(crate::clients::SLICE);
        }
    }

    pub fn resizes(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        let columns = beat.step.number;
        let terminal = self.find(name)?.terminal()?;
        terminal.screen.resize(columns);
        let mut stty = Command::new("stty");
        stty.args(["-F", &terminal.path, "columns", &columns.to_string()]);
        match stty.status().is_ok_and(|status| status.success()) {
            true => Ok(()),
            false => Err("the terminal cannot be resized".to_owned()),
        }
    }

    pub fn receives_signal(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        let process = self.find(name)?.terminal()?.process.ok_or("there is no process")?;
        crate::process::signal(process, &beat.step.word)
    }

    pub fn complains(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        let pattern = self.pattern(beat);
        let limit = self.theatre.patience.with_programs("a complaint");
        let program = self.find(name)?.program()?;
        while !program.complained.contains(&b'\n') {
            match program.complaints.read(&mut program.complained, limit) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => return Err("nothing on standard error".to_owned()),
            }
        }
        let end = program.complained.iter().position(|&byte| byte == b'\n');
        let line: Vec<u8> = program.complained.drain(..end.map_or(0, |end| end + 1)).collect();
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        match pattern.matches(line) {
            true => Ok(()),
            false => Err(side_by_side(&pattern.show(), &show(line))),
        }
    }

    pub fn exits(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        while !self.find(name)?.is_closed {
            self.read_more(name)?;
        }
        self.find(name)?.check_settings()?;
        self.nothing_unread(name)?;
        let limit = self.theatre.patience.with_programs("the end of a program");
        let program = self.find(name)?.program()?;
        let mut more = std::mem::take(&mut program.complained);
        while let Ok(true) = program.complaints.read(&mut more, limit) {}
        let ended = program.child.wait().map_err(|error| error.to_string())?;
        if ended.code() != Some(beat.step.number as i32) || !more.is_empty() {
            let received = format!("{ended} and '{}' on standard error", show(&more));
            let expected = format!("exit status {}", beat.step.number);
            return Err(side_by_side(&expected, &received));
        }
        self.forget(name);
        Ok(())
    }
}

/// Starts linechat-client; words like `LANG=pt` before its arguments are for its environment.
fn client_process(arguments: &str, columns: Option<usize>) -> Result<Line, String> {
    let mut words = arguments.split_whitespace().peekable();
    let client = env!("CARGO_BIN_EXE_linechat-client");
    let mut command = Command::new(if columns.is_some() { "script" } else { client });
    command.env_remove("NO_COLOR").envs([("TERM", "xterm"), ("LC_ALL", "")]);
    while let Some((name, value)) = words.peek().and_then(|word| word.split_once('=')) {
        if name.starts_with('-') {
            break;
        }
        command.env(name, value);
        words.next();
    }
    match columns {
        None => command.args(words),
        Some(columns) => command.env("SHELL", "/bin/sh").args([
            "--quiet",
            "--return",
            "--command",
            &format!(
                "stty columns {columns} rows 24; tty; stty -g; \
                 sh -c 'echo $$; exec {client} {}'; status=$?; stty -g; exit $status",
                words.collect::<Vec<_>>().join(" ")
            ),
            "/dev/null",
        ]),
    };
    Program::start(&mut command)
}
