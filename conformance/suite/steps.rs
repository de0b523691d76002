//! The steps of transcripts: one table, in which each has its form, what it needs, and the method
//! of the stage that plays it. A new step is a row here and a method.

use crate::clients::{Client, Line, Part};
use crate::stage::{Beat, Stage, LARGEST_PUSHED_ROSTER, LONGEST_LINE};
use crate::text::{parse_names, show, side_by_side, split_words, Pattern, Text};
use std::io::Write;

/// Bytes that somebody says at once.
const LONG: usize = 200_000;

/// What a step is to the order of things.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Changes something.
    Acts,
    /// Sends something from one client, which may go out in one piece with what it sends next.
    Sends,
    /// Looks at what has come.
    Asserts,
    /// Has a block of steps.
    Repeats,
}

/// What a step needs, so that a transcript is skipped where that is not to be had.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// What this client sends reaches the server as it is.
    PlainInput,
    /// What the server sends is seen as it is.
    PlainOutput,
    HalfClose,
    /// The client is a socket of the suite's.
    Socket,
    /// Nothing between server and suite reads on its own.
    OwnPace,
    /// The server's process, to read its console.
    Process,
    Signal,
    OurClient,
    Terminal,
    /// Nothing but time, so that once is enough.
    Time,
}

pub enum Play {
    /// For everybody whom the step names, one after the other.
    Each(fn(&mut Stage, &str, Beat) -> Result<(), String>),
    Once(fn(&mut Stage, Beat) -> Result<(), String>),
    /// Nothing but what is in its block.
    Block,
}

pub struct Form {
    /// Words that stand there as they are, and WHO (names), NUMBER, WORD, QUOTED (a text in
    /// quotation marks), TEXT (the rest), LINE (the rest and LF).
    pub form: &'static str,
    pub role: Role,
    pub needs: Needs,
    pub play: Play,
}

macro_rules! each {
    ($form:literal, $role:ident, $needs:ident, $play:ident) => {
        Form {
            form: $form,
            role: Role::$role,
            needs: Needs::$needs,
            play: Play::Each(|stage, name, beat| stage.$play(name, beat)),
        }
    };
}

macro_rules! once {
    ($form:literal, $role:ident, $needs:ident, $play:ident) => {
        Form {
            form: $form,
            role: Role::$role,
            needs: Needs::$needs,
            play: Play::Once(|stage, beat| stage.$play(beat)),
        }
    };
}

/// The first form that fits is meant.
#[rustfmt::skip]
static FORMS: &[Form] = &[
    Form { form: "NUMBER times", role: Role::Repeats, needs: Needs::Nothing, play: Play::Block },
    once!("in the room: WHO", Acts, PlainInput, in_the_room),
    once!("console < TEXT", Asserts, Process, console),
    once!("server receives WORD", Acts, Signal, server_receives),
    once!("server exits NUMBER", Asserts, Process, server_exits),
    each!("WHO connects", Acts, Nothing, connects),
    each!("WHO > LINE", Sends, PlainInput, sends),
    each!("WHO >> TEXT", Sends, PlainInput, sends),
    each!("WHO < [closed]", Asserts, Nothing, is_closed),
    each!("WHO < [some] TEXT", Asserts, Nothing, receives_some),
    each!("WHO < [all that was told]", Asserts, Socket, receives_all_told),
    each!("WHO < TEXT", Asserts, Nothing, receives),
    each!("WHO << TEXT", Asserts, PlainOutput, receives_bytes),
    each!("WHO after NUMBER s < TEXT", Asserts, Time, receives_after),
    each!("WHO closes", Acts, Nothing, closes),
    each!("WHO half-closes", Acts, HalfClose, half_closes),
    each!("WHO resets", Acts, Socket, resets),
    each!("WHO resets behind TEXT", Acts, Socket, resets),
    each!("WHO stops reading", Acts, OwnPace, stops_reading),
    each!("WHO falls behind what WORD tells", Acts, Socket, falls_behind),
    once!("WHO floods LINE", Acts, Socket, floods),
    each!("WHO reads NUMBER KiB a second", Acts, Socket, reads_slowly),
    each!("WHO must wait while nobody reads the answers to LINE", Asserts, Socket, must_wait),
    once!("WHO is cut off after NUMBER s", Asserts, Socket, are_cut_off),
    once!("NUMBER s pass", Acts, Time, time_passes),
    each!("WHO runs at NUMBER columns TEXT", Acts, Terminal, runs_at_terminal),
    each!("WHO runs TEXT", Acts, OurClient, runs),
    each!("WHO types QUOTED", Acts, OurClient, types),
    each!("WHO presses QUOTED", Acts, OurClient, presses),
    each!("WHO ends the input", Acts, OurClient, ends_input),
    each!("WHO sees QUOTED", Asserts, OurClient, receives),
    each!("WHO shows QUOTED", Asserts, Terminal, shows),
    each!("WHO complains QUOTED", Asserts, OurClient, complains),
    each!("WHO resizes to NUMBER columns", Acts, Terminal, resizes),
    each!("WHO receives WORD", Acts, Terminal, receives_signal),
    each!("WHO exits NUMBER", Asserts, OurClient, exits),
];

/// One line of a transcript.
pub struct Step {
    pub line: usize,
    pub source: String,
    pub form: &'static Form,
    pub who: Vec<String>,
    pub text: Text,
    pub number: usize,
    pub word: String,
    /// The steps to repeat.
    pub block: Vec<Step>,
}

impl Step {
    pub fn parse(line: usize, source: &str) -> Result<Step, String> {
        for form in FORMS {
            let mut step = Step {
                line,
                source: source.to_owned(),
                form,
                who: Vec::new(),
                text: Text::default(),
                number: 0,
                word: String::new(),
                block: Vec::new(),
            };
            if step.fill_in(form.form, source)? {
                return Ok(step);
            }
        }
        Err("not a step".to_owned())
    }

    /// Somebody enters the room.
    pub fn enters(&self) -> bool {
        let start: Vec<u8> = self.text.bytes().take(7).collect();
        self.form.form.starts_with("in the room")
            || self.form.role == Role::Asserts && start == b"WELCOME"
    }

    /// Says more than can wait anywhere without being read.
    pub fn is_long(&self) -> bool {
        self.text.bytes().nth(LONG).is_some()
    }

    /// Reads `rest` as a form says. Returns whether it has that form.
    fn fill_in(&mut self, form: &str, mut rest: &str) -> Result<bool, String> {
        for token in form.split(' ') {
            match token {
                "LINE" | "TEXT" => {
                    let end = if token == "LINE" { "\\n" } else { "" };
                    self.text = format!("{rest}{end}").parse()?;
                    return Ok(true);
                }
                "QUOTED" => {
                    let quoted = rest.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
                    self.text = quoted.ok_or("a text in quotation marks is missing")?.parse()?;
                    return Ok(true);
                }
                "WHO" => {
                    let who = who_stands_first(rest, form.starts_with("WHO"));
                    self.who = parse_names(&rest[..who])?;
                    rest = rest[who..].trim_start_matches(' ');
                    if self.who.is_empty() {
                        return Ok(false);
                    }
                }
                _ => {
                    let (word, behind) = rest.split_once(' ').unwrap_or((rest, ""));
                    match token {
                        "WORD" => self.word = word.to_owned(),
                        "NUMBER" => match word.parse() {
                            Ok(number) => self.number = number,
                            Err(_) => return Ok(false),
                        },
                        _ if word != token => return Ok(false),
                        _ => {}
                    }
                    rest = behind;
                }
            }
        }
        Ok(rest.is_empty())
    }
}

/// The length of the names that `text` begins with: all of it, or up to the first word that says
/// what somebody does.
fn who_stands_first(text: &str, is_followed: bool) -> usize {
    let is_verb = |word: &str| {
        let mut verbs = FORMS.iter().filter_map(|form| form.form.strip_prefix("WHO "));
        verbs.any(|verb| verb.split(' ').next() == Some(word))
    };
    let words = split_words(text).into_iter();
    let names = words.take_while(|(word, _)| !is_followed || !is_verb(word));
    names.last().map_or(0, |(_, end)| end)
}

/// How people come.
impl Stage<'_> {
    /// Everybody joins in turn, with all that each is told of it.
    fn in_the_room(&mut self, beat: Beat) -> Result<(), String> {
        if self.clients.iter().any(|client| client.part == Part::Cast) {
            return Err("'in the room' stands before everything else".to_owned());
        }
        let names = &beat.step.who;
        for (count, name) in (1..).zip(names) {
            let (here, others) = (&names[..count], &names[..count - 1]);
            self.enter(name, Part::Cast)?;
            let roster = match self.size(count) <= LARGEST_PUSHED_ROSTER {
                true => roster(here),
                false => Vec::new(),
            };
            self.expect(name, &format!("WELCOME {name} {count}"))?;
            for other in others {
                self.expect(other, &format!("JOINED {name} {count}"))?;
            }
            for (line, name) in roster.iter().flat_map(|line| here.iter().map(move |it| (line, it)))
            {
                self.expect(name, line)?;
            }
        }
        Ok(())
    }

    /// Connects somebody and asks for the name.
    pub fn enter(&mut self, name: &str, part: Part) -> Result<(), String> {
        self.goes_on()?;
        self.fence_all_but(name)?;
        self.connect(name, part)?;
        self.look_for(name, &Pattern(vec![b"HELLO linechat/1 ".to_vec(), Vec::new()]))?;
        self.find(name)?.send(format!("NAME {name}\n").as_bytes());
        Ok(())
    }

    fn expect(&mut self, name: &str, line: &str) -> Result<(), String> {
        let line = self.with_spectator(line.as_bytes().to_vec());
        self.look_for(name, &Pattern(vec![line]))
    }

    fn connects(&mut self, name: &str, _: Beat) -> Result<(), String> {
        self.fence_all_but(name)?;
        self.connect(name, Part::Cast)
    }
}

/// What is sent and received.
impl Stage<'_> {
    fn sends(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        if self.has_been_said(beat) {
            return Ok(());
        }
        self.fence_all_but(name)?;
        self.say(name, beat)
    }

    pub fn receives(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        let mut pattern = self.pattern(beat);
        if let (Part::Cast, [whole]) = (self.find(name)?.part, pattern.0.as_slice()) {
            pattern = Pattern(vec![self.with_spectator(whole.clone())]);
        }
        self.look_for(name, &pattern)
    }

    /// One line like this, and all further ones that follow it.
    fn receives_some(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        let pattern = self.pattern(beat);
        self.look_for(name, &pattern)?;
        loop {
            let client = self.find(name)?;
            let end = client.received.iter().position(|&byte| byte == b'\n');
            match end {
                Some(end) if pattern.matches(client.without_ending(&client.received[..=end])) => {
                    self.look_for(name, &pattern)?
                }
                Some(_) => return Ok(()),
                None if self.find(name)?.is_closed || self.read_more(name).is_err() => {
                    return Ok(())
                }
                None => {}
            }
        }
    }

    fn receives_bytes(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        let expected = self.bytes(beat);
        while self.find(name)?.received.len() < expected.len() {
            let unread = self.find(name)?.unread();
            self.read_more(name).map_err(|_| side_by_side(&show(&expected), &unread))?;
        }
        let client = self.find(name)?;
        let received = client.received.take(expected.len());
        client.history.push(received.clone());
        match received == expected {
            true => Ok(()),
            false => Err(side_by_side(&show(&expected), &show(&received))),
        }
    }

    fn is_closed(&mut self, name: &str, _: Beat) -> Result<(), String> {
        self.fence_all_but(name)?;
        self.await_end(name)?;
        self.find(name)?.was_to_close = true;
        self.nothing_unread(name)?;
        // One that stops need not go on reading.
        match self.find(name)?.is_reset && !self.is_stopping {
            true => Err(format!("{name}'s connection was reset, so the last lines can get lost")),
            false => Ok(()),
        }
    }
}

/// How people go.
impl Stage<'_> {
    fn closes(&mut self, name: &str, _: Beat) -> Result<(), String> {
        self.prepare_to_leave(name)?;
        self.forget(name);
        Ok(())
    }

    fn half_closes(&mut self, name: &str, _: Beat) -> Result<(), String> {
        self.fence_all_but(name)?;
        self.await_leave();
        self.find(name)?.end_input();
        Ok(())
    }

    /// Linux resets what is closed before all of it has been read.
    fn resets(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        self.prepare_to_leave(name)?;
        let last_words = self.bytes(beat);
        let limit = self.theatre.patience.with("PONG");
        if let Line::Socket(socket) = &mut self.find(name)?.line {
            let answered = socket
                .set_read_timeout(Some(limit))
                .and_then(|()| socket.write_all(b"PING\n"))
                .and_then(|()| socket.peek(&mut [0]))
                .and_then(|_| socket.write_all(&last_words));
            answered.map_err(|error| format!("no PONG before the reset: {error}"))?;
        }
        self.forget(name);
        Ok(())
    }

    pub fn stops_reading(&mut self, name: &str, _: Beat) -> Result<(), String> {
        self.prepare_to_leave(name)?;
        self.find(name)?.is_stalled = true;
        Ok(())
    }

    pub fn prepare_to_leave(&mut self, name: &str) -> Result<(), String> {
        self.fence_all_but(name)?;
        self.fence(name)?;
        self.nothing_unread(name)?;
        self.await_leave();
        Ok(())
    }
}

/// The server's process.
impl Stage<'_> {
    fn console(&mut self, beat: Beat) -> Result<(), String> {
        let expected = self.pattern(beat);
        let limit = self.theatre.patience.with_programs("a line of the console");
        let server = self.server.as_mut().ok_or("there is no console")?;
        let line = server.next_line_within(limit)?.unwrap_or("nothing more".to_owned());
        match expected.matches(line.as_bytes()) {
            true => Ok(()),
            false => Err(side_by_side(&expected.show(), &line)),
        }
    }

    fn server_receives(&mut self, beat: Beat) -> Result<(), String> {
        self.fence_all()?;
        self.is_loose = true;
        let server = self.server.as_ref().ok_or("there is no server to signal")?;
        crate::process::signal(server.child.id(), &beat.step.word)?;
        self.is_stopping = true;
        if beat.step.word == "SIGKILL" {
            self.server = None;
        }
        Ok(())
    }

    fn server_exits(&mut self, beat: Beat) -> Result<(), String> {
        let limit = self.theatre.patience.with_programs("the end of the server");
        self.no_more_on_the_console(limit)?;
        let server = self.server.as_mut().ok_or("there is no server")?;
        let ended = server.wait_within(limit).ok_or("the server does not end")?;
        let complaints = server.complaints();
        match ended.code() == Some(beat.step.number as i32) && complaints.is_empty() {
            true => Ok(()),
            false => Err(side_by_side(
                &format!("exit status {}", beat.step.number),
                &format!("{ended} {complaints}"),
            )),
        }
    }
}

/// The lines of a roster, as PROTOCOL.md, "Roster", divides it.
fn roster(names: &[String]) -> Vec<String> {
    let mut lines = Vec::<String>::new();
    for name in names {
        match lines.last_mut() {
            Some(last) if last.len() + 1 + name.len() + 2 <= LONGEST_LINE => {
                *last += &format!(" {name}")
            }
            _ => lines.push(format!("USERS {} {name}", names.len())),
        }
    }
    lines
}

/// Whether somebody is connected at all.
pub fn is_cast(client: &Client) -> bool {
    matches!(client.part, Part::Cast | Part::Ours)
}
