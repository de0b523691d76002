//! linechat-client: a window into a linechat room, for a person at a terminal or for a script.
//!
//! Try it, with a server running (see server.rs):
//!
//!     cargo run --release --bin linechat-client              (or: make run-client)
//!     echo hello | linechat-client localhost:9999 bot
//!
//! At a terminal the line being typed stays at the bottom, and what arrives is shown above it.
//! Without one it is a plain program: one line in, one line out.
//!
//! Threads that do nothing but wait, for the server, for the keyboard and for signals, hand what
//! comes to the main thread, which has all the state; one more thread writes to the server. So
//! nothing that is slow keeps anything else waiting. PROTOCOL.md says what goes over the wire.
//!
//! Top to bottom: the limits, the texts, what a typed line means, the keys, the line being typed,
//! the screen, the conversation, the command line, the terminal.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::{Duration, Instant};
use std::{env, mem, thread};

// ---------------------------------------------------------------------------------------------
// The limits
// ---------------------------------------------------------------------------------------------

const DEFAULT_HOST: &str = "localhost";
const DEFAULT_PORT: u16 = 9999;
/// Bytes of a request before its line ending (PROTOCOL.md, "Limits").
const MAX_REQUEST: usize = 4000;
/// Bytes of a line from the server, its ending included (PROTOCOL.md, "Limits").
const MAX_LINE: u64 = 4096;
/// In a larger room the roster is not pushed, and has to be asked for (PROTOCOL.md, "Roster").
const MAX_PUSHED_ROSTER: usize = 100;
/// Names remembered, whatever a server claims.
const MAX_ROSTER: usize = 100_000;
/// Requests on their way to a server that has not confirmed them; further ones wait.
const MAX_UNCONFIRMED: usize = 64;
/// Typed lines that wait; beyond it the keyboard is not read.
const MAX_WAITING: usize = 1000;
/// Lines remembered for the arrow keys.
const MAX_HISTORY: usize = 1000;
/// What arrived and what was typed, read ahead of being dealt with; and how many of those are dealt
/// with before the screen is drawn again.
const EVENTS_AHEAD: usize = 256;
/// How long each of the server's addresses may take to accept the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// After so much silence the server is asked for a sign of life.
const SILENCE: Duration = Duration::from_secs(30);
/// How long the server may take to greet, to give that sign, or to say BYE.
const PATIENCE: Duration = Duration::from_secs(10);

// ---------------------------------------------------------------------------------------------
// The texts
// ---------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Language {
    English,
    Portuguese,
}

/// Something that the client says, in English and in Portuguese. Each `{}` is filled in, in order.
type Text = [&'static str; 2];

/// Everything that the client says.
mod text {
    use super::Text;

    pub const YOUR_NAME: Text = ["Your name:", "Seu nome:"];
    pub const MESSAGE: Text = ["{}: {}", "{}: {}"];
    pub const PRIVATE: Text = ["[private] {}: {}", "[privado] {}: {}"];
    pub const PRIVATE_TO: Text = ["[private to {}] {}", "[privado para {}] {}"];
    pub const JOINED: Text = ["{} joined the chat.", "{} entrou no chat."];
    pub const LEFT: Text = ["{} left the chat.", "{} saiu do chat."];
    pub const USERS: Text = ["Users online ({}): {}", "Usuários conectados ({}): {}"];
    pub const ERROR: Text = ["Error: {}", "Erro: {}"];
    pub const NO_SUCH_USER: Text = ["User {} not found.", "Usuário {} não encontrado."];
    pub const BAD_NAME: Text = [
        "a name has 1 to 50 bytes: letters, digits, _ - . and no spaces; \
         the first is a letter or digit",
        "um nome tem de 1 a 50 bytes: letras, algarismos, _ - . e nenhum espaço; \
         o primeiro é letra ou algarismo",
    ];
    pub const NAME_TAKEN: Text = [
        "somebody here has that name; choose another",
        "alguém aqui já tem esse nome; escolha outro",
    ];
    pub const CONTROL_CHARACTERS: Text = [
        "control characters cannot be sent; the line was not",
        "caracteres de controle não podem ser enviados; a linha não foi",
    ];
    pub const FULL: Text = [
        "no more connections can be taken now; try again later",
        "não há lugar para mais conexões agora; tente mais tarde",
    ];
    pub const NO_NAME_IN_TIME: Text = ["no name was given in time", "nenhum nome foi dado a tempo"];
    pub const TOO_LONG: Text = [
        "that line is {} bytes too long and was not sent",
        "essa linha tem {} bytes a mais e não foi enviada",
    ];
    pub const NOTHING_SAID: Text = [
        "'{}' says nothing: put a text behind it; /help lists what can be typed",
        "'{}' não diz nada: ponha um texto depois; /help mostra o que se pode digitar",
    ];
    pub const TAKES_NOTHING: Text = [
        "/{} stands alone; to write to somebody of that name: @{} text",
        "/{} vem sozinho; para escrever a alguém com esse nome: @{} texto",
    ];
    pub const HELP: Text = [
        "\
Type a line and press Enter to say it to everybody.
@name text  says it to one person alone; so does /name text
/list       shows who is here
/help       shows this
/quit       leaves
//text      says a line that begins with a slash",
        "\
Digite uma linha e tecle Enter para dizê-la a todos.
@nome texto  diz só a uma pessoa; /nome texto também
/clientes    mostra quem está aqui
/help        mostra isto
/sair        sai
//texto      diz uma linha que começa com barra",
    ];
    pub const CANNOT_CONNECT: Text =
        ["cannot connect to {}: {}", "não foi possível conectar a {}: {}"];
    pub const REFUSED: Text =
        ["connection refused; is the server running?", "conexão recusada; o servidor está no ar?"];
    pub const NO_SUCH_HOST: Text =
        ["no address is known for that name", "não se conhece o endereço desse nome"];
    pub const NO_ANSWER: Text = ["no answer", "sem resposta"];
    pub const LOST: Text = ["lost the server at {}: {}", "o servidor em {} se perdeu: {}"];
    pub const NOT_LINECHAT: Text =
        ["what answers at {} is not linechat/1", "quem responde em {} não é linechat/1"];
    pub const CLOSED_BY: Text = ["{} closed the connection: {}", "{} encerrou a conexão: {}"];
    pub const CLOSED_CONNECTION: Text = ["it closed the connection", "ele encerrou a conexão"];
    pub const LINE_TOO_LONG: Text =
        ["it sent a line too long", "ele mandou uma linha longa demais"];
    pub const FELL_SILENT: Text = ["it fell silent", "ele se calou"];
    pub const NOT_SENT: Text = ["not sent: {}", "não enviado: {}"];
    pub const PERHAPS_NOT_SENT: Text = ["perhaps not sent: {}", "talvez não enviado: {}"];
    pub const SOME_NOT_TAKEN: Text =
        ["not all that was typed was taken", "nem tudo que foi digitado foi aceito"];
    pub const LEFT_AT_ONCE: Text =
        ["did not wait for the server's BYE", "saí sem esperar o BYE do servidor"];
    pub const NAME_REFUSED: Text =
        ["the name '{}' was refused: {}", "o nome '{}' foi recusado: {}"];
    pub const NO_OUTPUT: Text =
        ["cannot write to standard output: {}", "não consigo escrever na saída padrão: {}"];
    pub const NO_SUCH_OPTION: Text =
        ["there is no option {}; try --help", "não há a opção {}; tente --help"];
    pub const NO_SUCH_LANGUAGE: Text =
        ["--lang is en or pt, not '{}'", "--lang é en ou pt, e não '{}'"];
    pub const TOO_MANY_WORDS: Text = [
        "'{}' is too much: a host and a name, nothing more; try --help",
        "'{}' sobra: um servidor e um nome, nada mais; tente --help",
    ];
    pub const USAGE: Text = [
        "\
Usage: linechat-client [OPTIONS] [HOST[:PORT]] [NAME]

Joins the linechat room at HOST (default: localhost, port 9999) as NAME.
/help tells what can be typed there.

Options:
 --bell        ring on a private message or one with your name
 --no-color    no colours (nor with NO_COLOR or TERM=dumb set)
 --lang en|pt  English or Portuguese (default: what the locale says)
 --help        show this
 --version     show the version
",
        "\
Uso: linechat-client [OPÇÕES] [SERVIDOR[:PORTA]] [NOME]

Entra na sala de SERVIDOR (se nada for dito: localhost, porta 9999) como NOME.
/help mostra o que se pode digitar lá.

Opções:
 --bell        toca numa mensagem privada ou com o seu nome
 --no-color    sem cores (nem com NO_COLOR ou TERM=dumb)
 --lang en|pt  inglês ou português (se nada for dito: o que diz o locale)
 --help        mostra isto
 --version     mostra a versão
",
    ];
}

impl Language {
    /// What the locale says, by the first of its variables that says something (locale(7)).
    fn of_the_locale(variable: impl Fn(&str) -> Option<String>) -> Language {
        let mut set = ["LC_ALL", "LC_MESSAGES", "LANG"].into_iter().filter_map(variable);
        match set.find(|locale| !locale.is_empty()) {
            Some(locale) if locale.starts_with("pt") => Language::Portuguese,
            _ => Language::English,
        }
    }

    fn say(self, text: Text, words: &[&str]) -> String {
        let [english, portuguese] = text;
        let mut pieces = match self {
            Language::English => english.split("{}"),
            Language::Portuguese => portuguese.split("{}"),
        };
        let mut said = pieces.next().unwrap_or_default().to_owned();
        for (piece, word) in pieces.zip(words) {
            said += word;
            said += piece;
        }
        said
    }

    fn explain(self, error: &io::Error) -> String {
        match text_for_failure(error.kind()) {
            Some(text) => self.say(text, &[]),
            None => error.to_string(),
        }
    }
}

/// What an ERR of the server means (PROTOCOL.md, "Errors"); for other codes there is the
/// server's own text.
fn text_for_code(code: &str) -> Option<Text> {
    match code {
        "bad-name" => Some(text::BAD_NAME),
        "name-taken" => Some(text::NAME_TAKEN),
        "bad-text" => Some(text::CONTROL_CHARACTERS),
        "full" => Some(text::FULL),
        "timeout" => Some(text::NO_NAME_IN_TIME),
        _ => None,
    }
}

/// Why the operating system let something fail, as far as there are words for it.
fn text_for_failure(kind: ErrorKind) -> Option<Text> {
    match kind {
        ErrorKind::ConnectionRefused => Some(text::REFUSED),
        ErrorKind::TimedOut => Some(text::NO_ANSWER),
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted => Some(text::CLOSED_CONNECTION),
        _ => None,
    }
}

// ---------------------------------------------------------------------------------------------
// What a typed line means
// ---------------------------------------------------------------------------------------------

/// What a typed line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Typed {
    Nothing,
    Request(Request),
    Help,
    Quit,
    /// Nothing can be done with it, for this reason, which is about this word.
    Mistake(Text, String),
}

/// What can be asked of the server once one has a name.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Say(String),
    Whisper {
        to: String,
        text: String,
    },
    List,
    /// A list that is not shown, so that names can be completed.
    Roster,
    /// Nothing but a sign of life.
    Heartbeat,
}

fn understand(line: &str) -> Typed {
    let request = match line.strip_prefix(['@', '/']) {
        _ if line.trim().is_empty() => return Typed::Nothing,
        None => Request::Say(line.to_owned()),
        Some(rest) if line.starts_with("//") => Request::Say(rest.to_owned()),
        Some(rest) => {
            let (word, text) = rest.split_once(' ').unwrap_or((rest, ""));
            let command = match word.to_lowercase().as_str() {
                _ if line.starts_with('@') => None,
                "list" | "clientes" => Some(Typed::Request(Request::List)),
                "help" => Some(Typed::Help),
                "quit" | "sair" => Some(Typed::Quit),
                _ => None,
            };
            match (command, text.trim().is_empty()) {
                (Some(command), true) => return command,
                (Some(_), false) => return Typed::Mistake(text::TAKES_NOTHING, word.to_owned()),
                (None, true) => {
                    return Typed::Mistake(text::NOTHING_SAID, line.trim_end().to_owned())
                }
                (None, false) => Request::Whisper { to: word.to_owned(), text: text.to_owned() },
            }
        }
    };
    match request.wire().len().checked_sub(MAX_REQUEST + 1) {
        Some(excess @ 1..) => Typed::Mistake(text::TOO_LONG, excess.to_string()),
        _ => Typed::Request(request),
    }
}

impl Request {
    /// The line to send, with its ending (PROTOCOL.md, "Requests").
    fn wire(&self) -> String {
        match self {
            Request::Say(text) => format!("MSG {text}\n"),
            Request::Whisper { to, text } => format!("PRIV @{to} {text}\n"),
            Request::List | Request::Roster => "LIST\n".to_owned(),
            Request::Heartbeat => String::new(),
        }
    }

    /// What was typed and would be missed if it were lost.
    fn text(&self) -> Option<String> {
        match self {
            Request::Say(text) => Some(text.clone()),
            Request::Whisper { to, text } => Some(format!("@{to} {text}")),
            Request::List | Request::Roster | Request::Heartbeat => None,
        }
    }
}

/// Whether a character could move the cursor, forge a line or turn the direction of the text
/// (PROTOCOL.md, "Text"). TAB is one, though it may be sent.
fn is_unprintable(character: char) -> bool {
    let turns = matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    turns || character.is_control()
}

/// Text from the network without anything that a terminal would obey.
fn printable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for character in String::from_utf8_lossy(bytes).chars() {
        match character {
            '\t' => text.push('\t'),
            _ if is_unprintable(character) => text.extend(character.escape_default()),
            _ => text.push(character),
        }
    }
    text
}

// ---------------------------------------------------------------------------------------------
// The keys
// ---------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Character(char),
    Enter,
    Tab,
    Left,
    Right,
    Up,
    Down,
    Home,
    End,
    Backspace,
    Delete,
    EraseToStart,
    EraseToEnd,
    EraseWord,
    ClearScreen,
    /// Ctrl-C.
    Interrupt,
    /// Ctrl-D.
    EndOfInput,
    /// The terminal tells where pasted text begins and ends, if it can.
    PasteBegins,
    PasteEnds,
    Unknown,
}

/// Finds the keys in what a terminal sends, however it is cut into pieces.
#[derive(Default)]
struct Keys {
    pending: Vec<u8>,
}

impl Keys {
    /// The longest escape sequence that is waited for.
    const MAX_SEQUENCE: usize = 16;

    fn add(&mut self, bytes: &[u8]) {
        self.pending.extend(bytes);
    }

    /// The next whole key.
    fn next(&mut self) -> Option<Key> {
        let (key, length) = Self::first(&self.pending)?;
        self.pending.drain(..length);
        Some(key)
    }

    /// The first key in `bytes` and how many bytes it takes, if it is all there.
    fn first(bytes: &[u8]) -> Option<(Key, usize)> {
        let key = match bytes.first()? {
            0x1b => return Self::escape_sequence(bytes),
            b'\r' | b'\n' => Key::Enter,
            b'\t' => Key::Tab,
            0x08 | 0x7f => Key::Backspace,
            0x01 => Key::Home,
            0x02 => Key::Left,
            0x03 => Key::Interrupt,
            0x04 => Key::EndOfInput,
            0x05 => Key::End,
            0x06 => Key::Right,
            0x0b => Key::EraseToEnd,
            0x0c => Key::ClearScreen,
            0x0e => Key::Down,
            0x10 => Key::Up,
            0x15 => Key::EraseToStart,
            0x17 => Key::EraseWord,
            0x00..=0x1f => Key::Unknown,
            0x20..=0x7e => Key::Character(char::from(*bytes.first()?)),
            0x80.. => return Self::wide_character(bytes),
        };
        Some((key, 1))
    }

    /// A character of more than one byte.
    fn wide_character(bytes: &[u8]) -> Option<(Key, usize)> {
        let start = bytes.get(..4).unwrap_or(bytes);
        let chunk = start.utf8_chunks().next()?;
        if let Some(character) = chunk.valid().chars().next() {
            return Some((Key::Character(character), character.len_utf8()));
        }
        // Cut off, so there may be more of it to come; or not UTF-8 at all.
        let is_cut = std::str::from_utf8(start).is_err_and(|error| error.error_len().is_none());
        (!is_cut).then_some((Key::Unknown, chunk.invalid().len()))
    }

    /// ESC and what belongs to it: `ESC [ … final`, `ESC O final`, or one more key (ECMA-48; what
    /// the keys send is in the "Special Keys" part of xterm's control sequences).
    fn escape_sequence(bytes: &[u8]) -> Option<(Key, usize)> {
        let kind = *bytes.get(1)?;
        if kind != b'[' && kind != b'O' {
            // ESC by itself, or Alt with a key: neither means anything here.
            let (_, length) = Self::first(bytes.get(1..)?)?;
            return Some((Key::Unknown, 1 + length));
        }
        let rest = bytes.get(2..)?;
        let Some(end) = rest.iter().position(|byte| matches!(byte, 0x40..=0x7e)) else {
            return (rest.len() > Self::MAX_SEQUENCE).then_some((Key::Unknown, bytes.len()));
        };
        let key = match rest.get(..=end)? {
            b"A" => Key::Up,
            b"B" => Key::Down,
            b"C" => Key::Right,
            b"D" => Key::Left,
            b"H" | b"1~" | b"7~" => Key::Home,
            b"F" | b"4~" | b"8~" => Key::End,
            b"3~" => Key::Delete,
            b"200~" => Key::PasteBegins,
            b"201~" => Key::PasteEnds,
            _ => Key::Unknown,
        };
        Some((key, 2 + end + 1))
    }
}

// ---------------------------------------------------------------------------------------------
// The line being typed
// ---------------------------------------------------------------------------------------------

/// The line being typed: keys in, a line of the screen out. It knows neither terminal nor socket.
#[derive(Default)]
struct Editor {
    line: String,
    /// A byte position in `line`.
    cursor: usize,
    history: Vec<String>,
    /// How far back in the history the arrow keys have gone, and the line that was left for it.
    steps_back: usize,
    draft: String,
    is_pasting: bool,
    completion: Option<Completion>,
}

/// What Tab has put in, so that another Tab puts in the next.
struct Completion {
    stem: String,
    shown: usize,
}

/// What a key did that concerns others than the editor.
#[derive(Debug, PartialEq, Eq)]
enum Pressed {
    Edited,
    Entered(String),
    ClearScreen,
    Leave,
}

impl Editor {
    fn press(&mut self, key: Key, names: &[String]) -> Pressed {
        let completion = self.completion.take();
        match key {
            Key::Tab if !self.is_pasting => self.complete(completion, names),
            Key::Tab => self.insert('\t'),
            Key::Character(character) if !is_unprintable(character) => self.insert(character),
            Key::Enter => return Pressed::Entered(self.enter()),
            Key::Left => self.cursor = self.left_of(self.cursor),
            Key::Right => self.cursor = self.right_of(self.cursor),
            Key::Home => self.cursor = 0,
            Key::End => self.cursor = self.line.len(),
            Key::Up => self.go_back(self.steps_back + 1),
            Key::Down => self.go_back(self.steps_back.saturating_sub(1)),
            Key::Backspace => self.erase(self.left_of(self.cursor), self.cursor),
            Key::Delete => self.erase(self.cursor, self.right_of(self.cursor)),
            Key::EraseToStart => self.erase(0, self.cursor),
            Key::EraseToEnd => self.erase(self.cursor, self.line.len()),
            Key::EraseWord => {
                let before = self.line.get(..self.cursor).unwrap_or_default().trim_end();
                let word = before.trim_end_matches(|c: char| !c.is_whitespace()).len();
                self.erase(word, self.cursor);
            }
            Key::ClearScreen => return Pressed::ClearScreen,
            Key::Interrupt => return Pressed::Leave,
            Key::EndOfInput if self.line.is_empty() => return Pressed::Leave,
            Key::EndOfInput => self.erase(self.cursor, self.right_of(self.cursor)),
            Key::PasteBegins => self.is_pasting = true,
            Key::PasteEnds => self.is_pasting = false,
            Key::Character(_) | Key::Unknown => {}
        }
        Pressed::Edited
    }

    fn insert(&mut self, character: char) {
        self.line.insert(self.cursor, character);
        self.cursor += character.len_utf8();
    }

    fn erase(&mut self, from: usize, to: usize) {
        self.line.replace_range(from..to, "");
        self.cursor = from;
    }

    fn enter(&mut self) -> String {
        self.cursor = 0;
        self.steps_back = 0;
        mem::take(&mut self.line)
    }

    fn remember(&mut self, line: &str) {
        if self.history.last().map(String::as_str) != Some(line) {
            self.history.push(line.to_owned());
        }
        if self.history.len() > MAX_HISTORY {
            self.history.remove(0);
        }
    }

    /// Shows the line that was entered so many lines ago; 0 is the one that is being typed.
    fn go_back(&mut self, steps: usize) {
        let Some(at) = self.history.len().checked_sub(steps) else { return };
        if steps == self.steps_back {
            return;
        }
        let line = match self.history.get(at) {
            Some(line) => line.clone(),
            None => mem::take(&mut self.draft),
        };
        let left = mem::replace(&mut self.line, line);
        if self.steps_back == 0 && steps > 0 {
            self.draft = left;
        }
        self.steps_back = steps;
        self.cursor = self.line.len();
    }

    /// Completes a name behind `@` or `/` at the start of the line; again, with the next name.
    fn complete(&mut self, completion: Option<Completion>, names: &[String]) {
        let Some(before) = self.line.get(1..self.cursor) else { return };
        let completion = match completion {
            Some(Completion { stem, shown }) => Completion { stem, shown: shown + 1 },
            None if before.contains(' ') => return,
            None => Completion { stem: before.to_lowercase(), shown: 0 },
        };
        let fits = |name: &&String| name.to_lowercase().starts_with(&completion.stem);
        let count = names.iter().filter(fits).count();
        let at = completion.shown.checked_rem(count).unwrap_or(0);
        let name = names.iter().filter(fits).nth(at);
        if let (Some(name), true) = (name, self.line.starts_with(['@', '/'])) {
            let rest = self.line.get(self.cursor..).unwrap_or_default().trim_start();
            let mark = self.line.get(..1).unwrap_or_default();
            let completed = format!("{mark}{name} ");
            self.line = format!("{completed}{rest}");
            self.cursor = completed.len();
            self.completion = Some(completion);
        }
    }

    fn left_of(&self, at: usize) -> usize {
        (0..at).rev().find(|&at| self.is_between_characters(at)).unwrap_or(0)
    }

    fn right_of(&self, at: usize) -> usize {
        let end = self.line.len();
        (at + 1..=end).find(|&at| self.is_between_characters(at)).unwrap_or(end)
    }

    /// Whether the cursor may stand here: not within a character's bytes, nor before an accent or
    /// within an emoji that is made of several.
    fn is_between_characters(&self, at: usize) -> bool {
        let (Some(before), Some(after)) = (self.line.get(..at), self.line.get(at..)) else {
            return false;
        };
        let is_joined = before.ends_with(JOINER) || after.starts_with(SKIN_TONES);
        !is_joined && !after.starts_with(|c| width(c) == 0)
    }

    /// What to show in so many columns: the parts before and after the cursor. A longer line is
    /// shown in part, moved by half a window at a time so that one sees what is around the cursor.
    fn view(&self, columns: usize) -> (String, String) {
        let (before, after) = self.line.split_at_checked(self.cursor).unwrap_or_default();
        let half = columns.div_ceil(2).max(1);
        let skipped = width_of(before).saturating_sub(columns).div_ceil(half) * half;
        let mut column = 0;
        let before: String =
            before.chars().skip_while(|&c| (column < skipped, column += width(c)).0).collect();
        let mut column = width_of(&before);
        let after = after.chars().take_while(|&c| (column += width(c), column <= columns).1);
        // A TAB would be as wide as the terminal likes.
        (before.replace('\t', " "), after.collect::<String>().replace('\t', " "))
    }
}

/// Joins the emoji on both its sides into one.
const JOINER: char = '\u{200d}';
const SKIN_TONES: fn(char) -> bool = |c| matches!(c, '\u{1f3fb}'..='\u{1f3ff}');

fn width_of(text: &str) -> usize {
    text.chars().map(width).sum()
}

/// How many columns a terminal gives to a character: none to accents and other marks, two to the
/// scripts of East Asia and to emoji (Unicode 15, UAX #11). Where a terminal thinks otherwise, the
/// cursor is still right (see `Screen::draw`); only where a long line is cut is not.
fn width(character: char) -> usize {
    // The bounds of the blocks: where one begins, where it has ended, where the next begins, …
    const NONE: &[u32] = &[
        0x300, 0x370, 0x483, 0x48a, 0x591, 0x5be, 0x610, 0x61b, 0x64b, 0x660, 0x6d6, 0x6dd, 0x900,
        0x903, 0x93c, 0x93d, 0x941, 0x949, 0x94d, 0x94e, 0xe31, 0xe32, 0xe34, 0xe3b, 0xe47, 0xe4f,
        0x1ab0, 0x1b00, 0x1dc0, 0x1e00, 0x200b, 0x2010, 0x2060, 0x2065, 0x20d0, 0x2100, 0x302a,
        0x302e, 0x3099, 0x309b, 0xfe00, 0xfe10, 0xfe20, 0xfe30, 0xfeff, 0xff00, 0xe0000, 0xe01f0,
    ];
    const TWO: &[u32] = &[
        0x1100, 0x1160, 0x231a, 0x231c, 0x23e9, 0x23ed, 0x23f0, 0x23f1, 0x23f3, 0x23f4, 0x25fd,
        0x25ff, 0x2614, 0x2616, 0x2648, 0x2654, 0x267f, 0x2680, 0x2693, 0x2694, 0x26a1, 0x26a2,
        0x26aa, 0x26ac, 0x26bd, 0x26bf, 0x26c4, 0x26c6, 0x26ce, 0x26cf, 0x26d4, 0x26d5, 0x26ea,
        0x26eb, 0x26f2, 0x26f4, 0x26f5, 0x26f6, 0x26fa, 0x26fb, 0x26fd, 0x26fe, 0x2705, 0x2706,
        0x270a, 0x270c, 0x2728, 0x2729, 0x274c, 0x274d, 0x274e, 0x274f, 0x2753, 0x2756, 0x2757,
        0x2758, 0x2795, 0x2798, 0x27b0, 0x27b1, 0x27bf, 0x27c0, 0x2b1b, 0x2b1d, 0x2b50, 0x2b51,
        0x2b55, 0x2b56, 0x2e80, 0x303f, 0x3041, 0xa4d0, 0xa960, 0xa97d, 0xac00, 0xd7a4, 0xf900,
        0xfb00, 0xfe30, 0xfe70, 0xff00, 0xff61, 0xffe0, 0xffe7, 0x1f004, 0x1f005, 0x1f0cf, 0x1f0d0,
        0x1f18e, 0x1f18f, 0x1f191, 0x1f19b, 0x1f200, 0x1f321, 0x1f32d, 0x1f336, 0x1f337, 0x1f37d,
        0x1f37e, 0x1f394, 0x1f3a0, 0x1f3cb, 0x1f3cf, 0x1f3d4, 0x1f3e0, 0x1f3f1, 0x1f3f4, 0x1f3f5,
        0x1f3f8, 0x1f43f, 0x1f440, 0x1f441, 0x1f442, 0x1f4fd, 0x1f4ff, 0x1f53e, 0x1f54b, 0x1f54f,
        0x1f550, 0x1f568, 0x1f57a, 0x1f57b, 0x1f595, 0x1f597, 0x1f5a4, 0x1f5a5, 0x1f5fb, 0x1f650,
        0x1f680, 0x1f6c6, 0x1f6cc, 0x1f6cd, 0x1f6d0, 0x1f6d3, 0x1f6d5, 0x1f6e0, 0x1f6eb, 0x1f6ed,
        0x1f6f4, 0x1f6fd, 0x1f7e0, 0x1f7f1, 0x1f90c, 0x1f93b, 0x1f93c, 0x1f946, 0x1f947, 0x1fa00,
        0x1fa70, 0x1fb00, 0x20000, 0x3fffe,
    ];
    let is_within =
        |bounds: &[u32]| bounds.partition_point(|&bound| bound <= u32::from(character)) % 2 == 1;
    match character {
        _ if is_within(NONE) => 0,
        _ if is_within(TWO) => 2,
        _ => 1,
    }
}

// ---------------------------------------------------------------------------------------------
// The screen
// ---------------------------------------------------------------------------------------------

/// How something that is shown stands apart, as ECMA-48 numbers it (SGR).
const PRIVATE: &str = "1";
const ERROR: &str = "31";
const NOTICE: &str = "2";
/// Colours that can be read on a dark and on a light background alike.
const NAMES: [&str; 10] = ["31", "32", "33", "34", "35", "36", "91", "92", "94", "95"];

/// Where the conversation is shown.
struct Screen {
    /// At a terminal, the line being typed, which stays below everything else.
    input: Option<Input>,
    has_colours: bool,
    /// To be shown with the next `flush`.
    pending: String,
}

struct Input {
    editor: Editor,
    keys: Keys,
    prompt: String,
    columns: usize,
    /// What was last drawn, and how wide the part before the cursor was in it.
    drawing: String,
    drawn: usize,
    /// What takes back the last drawing.
    erase: String,
}

impl Screen {
    fn new(is_terminal: bool, has_colours: bool) -> Self {
        let input = is_terminal.then(|| Input {
            editor: Editor::default(),
            keys: Keys::default(),
            prompt: String::new(),
            columns: terminal::columns(),
            drawing: String::new(),
            drawn: 0,
            erase: ERASE.to_owned(),
        });
        Screen { input, has_colours, pending: String::new() }
    }

    fn show(&mut self, text: &str) {
        self.pending += text;
        self.pending.push('\n');
    }

    /// Asks for something: beside the line being typed, or on a line of its own.
    fn ask(&mut self, question: &str) {
        match &mut self.input {
            Some(input) => input.prompt = format!("{question} "),
            None => self.show(question),
        }
    }

    fn painted(&self, colour: &str, text: &str) -> String {
        match self.has_colours {
            true => format!("\x1b[{colour}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    /// A name in a colour of its own, the same wherever it appears.
    fn name(&self, name: &str) -> String {
        let mix = |sum: usize, byte: u8| sum.wrapping_mul(31).wrapping_add(byte.into());
        let colour = NAMES.get(name.to_lowercase().bytes().fold(0, mix) % NAMES.len());
        self.painted(colour.copied().unwrap_or_default(), name)
    }

    /// The window has another size. Terminals that fold a line which no longer fits leave its
    /// first rows above the cursor.
    fn resize(&mut self) {
        if let Some(input) = &mut self.input {
            input.columns = terminal::columns();
            if let rows @ 1.. = input.drawn / input.columns {
                input.erase = format!("\x1b[{rows}A{ERASE}");
            }
        }
    }

    fn clear(&mut self) {
        self.pending.clear();
        if let Some(input) = &mut self.input {
            input.erase = CLEAR.to_owned();
        }
    }

    /// Shows what is pending, with one write.
    fn flush(&mut self) -> io::Result<()> {
        let mut shown = mem::take(&mut self.pending);
        if let Some(input) = &mut self.input {
            let drawing = input.draw();
            if shown.is_empty() && input.erase == ERASE && input.drawing == drawing {
                return Ok(());
            }
            let erase = mem::replace(&mut input.erase, ERASE.to_owned());
            shown = erase + &shown + &drawing;
            input.drawing = drawing;
        }
        let mut out = io::stdout().lock();
        out.write_all(shown.as_bytes())?;
        out.flush()
    }
}

/// To the start of the row, and nothing from there on (ECMA-48: CR, ED).
const ERASE: &str = "\r\x1b[J";
/// To the first row and column, and nothing from there on (CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[J";

impl Input {
    /// The prompt and the line. What stands before the cursor is printed, the cursor saved, the
    /// rest printed, and the cursor restored (`ESC 7`, `ESC 8`): so it is right even where the
    /// terminal gives a character another width than `width` does. Nothing wraps meanwhile.
    fn draw(&mut self) -> String {
        let prompt = match self.columns {
            0..20 => "",
            _ => &self.prompt,
        };
        let room = self.columns.saturating_sub(width_of(prompt) + 1);
        let (before, after) = self.editor.view(room);
        self.drawn = width_of(prompt) + width_of(&before);
        format!("\x1b[?7l{prompt}{before}\x1b7{after}\x1b8\x1b[?7h")
    }
}

// ---------------------------------------------------------------------------------------------
// The conversation
// ---------------------------------------------------------------------------------------------

/// What the main thread waits for.
enum Event {
    Arrived(String),
    /// The server is gone, for this reason.
    Lost(String),
    /// Something was typed; it waits in a channel of its own.
    Typed,
    /// The window has another size.
    Resized,
}

/// Where the conversation stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing has come from the server yet.
    Greeting,
    /// A name is to be typed.
    Asking,
    /// A name was sent.
    Naming,
    Talking,
    /// QUIT was sent; the server's BYE is awaited.
    Leaving,
}

/// How the conversation ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The server said BYE to our QUIT.
    Left,
    /// For this reason.
    Failed(String),
}

/// A request that the server has not confirmed. Each is followed by a PING, whose PONG tells that
/// it has been carried out (PROTOCOL.md, "Order, pipelining, fences"); so an ERR is always about the
/// first of them, and what is lost with a connection is known.
struct Sent {
    token: u64,
    request: Request,
    is_refused: bool,
}

struct Client {
    address: String,
    language: Language,
    rings: bool,
    screen: Screen,
    /// To the thread that writes to the server.
    out: Sender<String>,
    stage: Stage,
    /// The name that is tried, or was accepted.
    name: Option<String>,
    /// The name is a script's, which cannot choose another.
    has_one_name: bool,
    /// Typed, and not yet sent.
    waiting: VecDeque<Request>,
    unconfirmed: VecDeque<Sent>,
    requests: u64,
    /// Nothing more will be typed.
    is_leaving: bool,
    /// Something was not taken, which a script should know.
    is_troubled: bool,
    /// Who is in the room, as far as is known.
    roster: Vec<String>,
    /// Of a roster that takes several lines, some are still to come.
    is_reading_roster: bool,
    /// When the server last gave a sign of life, and whether it has been asked for one since.
    quiet_since: Instant,
    has_asked_for_life: bool,
}

impl Client {
    fn new(address: String, options: Options, screen: Screen, out: Sender<String>) -> Self {
        Client {
            address,
            language: options.language,
            rings: options.rings,
            has_one_name: options.name.is_some() && screen.input.is_none(),
            screen,
            out,
            stage: Stage::Greeting,
            name: options.name,
            waiting: VecDeque::new(),
            unconfirmed: VecDeque::new(),
            requests: 0,
            is_leaving: false,
            is_troubled: false,
            roster: Vec::new(),
            is_reading_roster: false,
            quiet_since: Instant::now(),
            has_asked_for_life: false,
        }
    }

    /// Talks until the end.
    fn run(&mut self, events: &Receiver<Event>, typed: &Receiver<Vec<u8>>) -> End {
        loop {
            if let Err(end) = self.turn(events, typed) {
                // What came last is still to be seen.
                return self.flush().err().unwrap_or(end);
            }
        }
    }

    /// Deals with whatever there is, then shows what came of it. An error is the end.
    fn turn(&mut self, events: &Receiver<Event>, typed: &Receiver<Vec<u8>>) -> Result<(), End> {
        let patience = self.deadline().saturating_duration_since(Instant::now());
        match events.recv_timeout(patience) {
            Ok(event) => self.happened(event)?,
            Err(RecvTimeoutError::Timeout) => self.grow_impatient()?,
            Err(RecvTimeoutError::Disconnected) => return Err(End::Left),
        }
        for event in events.try_iter().take(EVENTS_AHEAD) {
            self.happened(event)?;
        }
        while self.can_take_more() {
            match typed.try_recv() {
                Ok(bytes) => self.typed(&bytes)?,
                Err(_) => break,
            }
            self.send_waiting();
        }
        self.send_waiting();
        self.flush()
    }

    fn flush(&mut self) -> Result<(), End> {
        let shown = self.screen.flush();
        shown.map_err(|error| self.failed(text::NO_OUTPUT, &[&error.to_string()]))
    }

    fn happened(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Arrived(line) => {
                self.quiet_since = Instant::now();
                self.has_asked_for_life = false;
                self.arrived(&line)
            }
            Event::Lost(reason) => Err(self.failed(text::LOST, &[&self.address, &reason])),
            Event::Resized => {
                self.screen.resize();
                Ok(())
            }
            Event::Typed => Ok(()),
        }
    }

    fn failed(&self, text: Text, words: &[&str]) -> End {
        End::Failed(self.language.say(text, words))
    }

    // Time

    /// When patience with the server ends.
    fn deadline(&self) -> Instant {
        match self.stage {
            Stage::Greeting | Stage::Leaving => self.quiet_since + PATIENCE,
            _ if self.has_asked_for_life => self.quiet_since + SILENCE + PATIENCE,
            _ => self.quiet_since + SILENCE,
        }
    }

    /// The deadline has passed: the server is asked for a sign of life, or given up.
    fn grow_impatient(&mut self) -> Result<(), End> {
        if matches!(self.stage, Stage::Greeting | Stage::Leaving) || self.has_asked_for_life {
            let reason = self.language.say(text::FELL_SILENT, &[]);
            return Err(self.failed(text::LOST, &[&self.address, &reason]));
        }
        self.has_asked_for_life = true;
        self.send(Request::Heartbeat);
        Ok(())
    }

    // What arrives

    /// A line of the server. One with an unknown keyword is ignored (PROTOCOL.md, "Versioning").
    fn arrived(&mut self, line: &str) -> Result<(), End> {
        let (keyword, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (first, text) = rest.split_once(' ').unwrap_or((rest, ""));
        match (self.stage, keyword) {
            (Stage::Leaving, "BYE") => return Err(End::Left),
            (_, "BYE") => return Err(self.failed(text::CLOSED_BY, &[&self.address, rest])),
            (Stage::Greeting, "ERR") => {
                let reason = self.explain(first, text);
                return Err(self.failed(text::CLOSED_BY, &[&self.address, &reason]));
            }
            (Stage::Greeting, "HELLO") if first == "linechat/1" => {
                self.stage = Stage::Asking;
                match self.name.clone() {
                    Some(name) => self.try_name(name),
                    None => self.ask_for_name(),
                }
            }
            (Stage::Greeting, _) => return Err(self.failed(text::NOT_LINECHAT, &[&self.address])),
            (Stage::Naming, "WELCOME") => self.welcomed(first, text),
            (Stage::Naming, "ERR") => self.name_refused(first, text)?,
            (_, "ERR") => self.refused(first, text),
            (_, "PONG") => self.confirmed(first),
            (_, "MSG") => {
                self.show(text::MESSAGE, first, text);
                let name = self.name.as_deref().unwrap_or_default().to_lowercase();
                let mut words = text.split(|c: char| !is_part_of_name(c));
                self.ring_if(words.any(|word| word.to_lowercase() == name));
            }
            (_, "PRIV") => {
                self.show(text::PRIVATE, first, text);
                self.ring_if(true);
            }
            (_, "SENT") => self.show(text::PRIVATE_TO, first, text),
            (_, "JOINED") => {
                self.show(text::JOINED, first, "");
                if !first.is_empty() && self.roster.len() < MAX_ROSTER {
                    self.roster.push(first.to_owned());
                }
            }
            (_, "LEFT") => {
                self.show(text::LEFT, first, "");
                self.roster.retain(|name| name != first);
            }
            (_, "USERS") => self.list(first, text),
            (_, "HELP") => self.screen.show(rest),
            _ => {}
        }
        Ok(())
    }

    /// Shows what somebody said or did, if the line says who.
    fn show(&mut self, text: Text, name: &str, said: &str) {
        if name.is_empty() {
            return;
        }
        let shown = match text {
            text::PRIVATE | text::PRIVATE_TO => {
                let shown = self.language.say(text, &[name, said]);
                self.screen.painted(PRIVATE, &shown)
            }
            text::MESSAGE => self.language.say(text, &[&self.screen.name(name), said]),
            _ => {
                let shown = self.language.say(text, &[name]);
                self.screen.painted(NOTICE, &shown)
            }
        };
        self.screen.show(&shown);
    }

    fn ring_if(&mut self, is_for_us: bool) {
        if self.rings && is_for_us {
            self.screen.pending.push('\x07');
        }
    }

    /// What an ERR says, in words of the screen's language where there are some.
    fn explain(&self, code: &str, text: &str) -> String {
        match text_for_code(code) {
            Some(text) => self.language.say(text, &[]),
            None if text.is_empty() => code.to_owned(),
            None => text.to_owned(),
        }
    }

    fn complain(&mut self, text: &str) {
        self.is_troubled = true;
        self.screen.show(&self.screen.painted(ERROR, text));
    }

    fn complain_of_error(&mut self, reason: &str) {
        self.complain(&self.language.say(text::ERROR, &[reason]));
    }

    /// An ERR that answers the first request which is not confirmed.
    fn refused(&mut self, code: &str, text: &str) {
        let mut complaint = self.language.say(text::ERROR, &[&self.explain(code, text)]);
        if let Some(first) = self.unconfirmed.front_mut() {
            first.is_refused = true;
            if let (Request::Whisper { to, .. }, "no-such-user") = (&first.request, code) {
                complaint = self.language.say(text::NO_SUCH_USER, &[to]);
            }
        }
        self.complain(&complaint);
    }

    /// A PONG: everything up to the request with this token has been carried out. Our own messages
    /// are shown now, in their place among what others said.
    fn confirmed(&mut self, token: &str) {
        let Ok(token) = token.parse::<u64>() else { return };
        while self.unconfirmed.front().is_some_and(|sent| sent.token <= token) {
            let Some(sent) = self.unconfirmed.pop_front() else { return };
            if let (Request::Say(text), false, true, Some(name)) =
                (sent.request, sent.is_refused, self.screen.input.is_some(), self.name.clone())
            {
                self.show(text::MESSAGE, &name, &text);
            }
        }
    }

    /// A part of the roster (PROTOCOL.md, "Roster"); shown when the last part has come.
    fn list(&mut self, count: &str, names: &str) {
        if !mem::replace(&mut self.is_reading_roster, true) {
            self.roster.clear();
        }
        let names = names.split(' ').filter(|name| !name.is_empty());
        let room = MAX_ROSTER.saturating_sub(self.roster.len());
        self.roster.extend(names.take(room).map(str::to_owned));
        if count.parse().is_ok_and(|count: usize| self.roster.len() < count.min(MAX_ROSTER)) {
            return;
        }
        self.is_reading_roster = false;
        let is_for_completion =
            self.unconfirmed.front().is_some_and(|sent| matches!(sent.request, Request::Roster));
        if !is_for_completion {
            let names: Vec<_> = self.roster.iter().map(|name| self.screen.name(name)).collect();
            let shown = self.language.say(text::USERS, &[count, &names.join(", ")]);
            self.screen.show(&shown);
        }
    }

    // The name

    fn ask_for_name(&mut self) {
        self.screen.ask(&self.language.say(text::YOUR_NAME, &[]));
    }

    fn try_name(&mut self, name: String) {
        self.stage = Stage::Naming;
        let _ = self.out.send(format!("NAME {name}\n"));
        self.name = Some(name);
    }

    fn name_refused(&mut self, code: &str, text: &str) -> Result<(), End> {
        let reason = self.explain(code, text);
        let name = self.name.take().unwrap_or_default();
        if self.has_one_name {
            return Err(self.failed(text::NAME_REFUSED, &[&name, &reason]));
        }
        self.stage = Stage::Asking;
        self.complain_of_error(&reason);
        self.ask_for_name();
        Ok(())
    }

    fn welcomed(&mut self, name: &str, count: &str) {
        self.stage = Stage::Talking;
        self.name = Some(name.to_owned());
        self.is_troubled = false;
        if let Some(input) = &mut self.screen.input {
            input.prompt = "> ".to_owned();
            if count.parse().is_ok_and(|count: usize| count > MAX_PUSHED_ROSTER) {
                self.send(Request::Roster);
            }
        }
    }

    // What is typed

    /// Without a terminal, a line is taken only when it can be dealt with, since what is behind it
    /// depends on that; at one, keys are always taken.
    fn can_take_more(&self) -> bool {
        match (&self.screen.input, self.stage) {
            (Some(_), _) => self.waiting.len() < MAX_WAITING,
            (None, Stage::Asking | Stage::Talking) => self.waiting.is_empty() && !self.is_leaving,
            (None, _) => false,
        }
    }

    /// Keys of the terminal, or one line of something else; nothing at all at the end of it.
    fn typed(&mut self, bytes: &[u8]) -> Result<(), End> {
        if bytes.is_empty() {
            return self.leave();
        }
        let Some(input) = &mut self.screen.input else {
            let line = String::from_utf8_lossy(bytes);
            return self.entered(line.trim_end_matches(['\r', '\n']));
        };
        input.keys.add(bytes);
        while let Some(key) = self.screen.input.as_mut().and_then(|input| input.keys.next()) {
            let Some(input) = &mut self.screen.input else { break };
            match input.editor.press(key, &self.roster) {
                Pressed::Edited => {}
                Pressed::ClearScreen => self.screen.clear(),
                Pressed::Leave => self.leave()?,
                Pressed::Entered(line) => {
                    if !line.is_empty() && self.stage != Stage::Asking {
                        input.editor.remember(&line);
                    }
                    self.entered(&line)?;
                }
            }
        }
        Ok(())
    }

    fn entered(&mut self, line: &str) -> Result<(), End> {
        let needs_name = self.name.is_none();
        match understand(line) {
            Typed::Nothing => {}
            Typed::Help => self.screen.show(&self.language.say(text::HELP, &[])),
            Typed::Quit => {
                // Who asks to leave has seen what was refused; a script that just ends has not.
                self.is_troubled = false;
                return self.leave();
            }
            _ if needs_name && self.stage == Stage::Asking => self.try_name(line.trim().to_owned()),
            _ if needs_name => self.name = Some(line.trim().to_owned()),
            Typed::Request(request) => self.waiting.push_back(request),
            Typed::Mistake(text, word) => {
                let reason = self.language.say(text, &[&word, &word]);
                self.complain_of_error(&reason);
            }
        }
        Ok(())
    }

    /// Leaves once what was typed before is sent; asked a second time, at once.
    fn leave(&mut self) -> Result<(), End> {
        match mem::replace(&mut self.is_leaving, true) && self.screen.input.is_some() {
            true => Err(self.failed(text::LEFT_AT_ONCE, &[])),
            false => Ok(()),
        }
    }

    // What is sent

    /// Sends what has been typed, as far as the stage allows.
    fn send_waiting(&mut self) {
        while self.stage == Stage::Talking && self.unconfirmed.len() < MAX_UNCONFIRMED {
            match self.waiting.pop_front() {
                Some(request) => self.send(request),
                None => break,
            }
        }
        let has_said_all = self.waiting.is_empty() && self.stage == Stage::Talking;
        let has_no_name = self.stage == Stage::Asking;
        if self.is_leaving && (has_said_all || has_no_name) {
            self.stage = Stage::Leaving;
            self.quiet_since = Instant::now();
            let _ = self.out.send("QUIT\n".to_owned());
        }
    }

    fn send(&mut self, request: Request) {
        self.requests += 1;
        let token = self.requests;
        // Nobody takes it when the server is lost, which another thread reports.
        let _ = self.out.send(format!("{}PING {token}\n", request.wire()));
        self.unconfirmed.push_back(Sent { token, request, is_refused: false });
    }

    /// What was typed and did not, or perhaps not, reach the server, as sentences.
    fn unsent(&self, end: &End) -> Vec<String> {
        // BYE comes after everything that was sent before QUIT has been carried out.
        let unconfirmed = self.unconfirmed.iter().filter(|_| *end != End::Left);
        let unconfirmed = unconfirmed.filter(|sent| !sent.is_refused);
        let unconfirmed = unconfirmed.filter_map(|sent| sent.request.text());
        let typed = self.screen.input.as_ref().map(|input| input.editor.line.clone());
        let waiting = self.waiting.iter().filter_map(Request::text).chain(typed);
        let waiting = waiting.filter(|text| !text.is_empty());
        let report = |text| move |line: String| self.language.say(text, &[&line]);
        let perhaps = unconfirmed.map(report(text::PERHAPS_NOT_SENT));
        perhaps.chain(waiting.map(report(text::NOT_SENT))).collect()
    }
}

/// Whether a character can stand in a name (PROTOCOL.md, "Requests").
fn is_part_of_name(character: char) -> bool {
    character.is_alphanumeric() || matches!(character, '_' | '-' | '.')
}

// The threads

fn listen_to_server(socket: TcpStream, events: &SyncSender<Event>, language: Language) {
    let mut socket = BufReader::new(socket);
    let reason = loop {
        let mut line = Vec::new();
        match (&mut socket).take(MAX_LINE).read_until(b'\n', &mut line) {
            Err(error) => break language.explain(&error),
            Ok(_) if line.ends_with(b"\n") => {
                line.pop();
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                if events.send(Event::Arrived(printable(&line))).is_err() {
                    return;
                }
            }
            Ok(length) if length as u64 == MAX_LINE => {
                break language.say(text::LINE_TOO_LONG, &[])
            }
            Ok(_) => break language.say(text::CLOSED_CONNECTION, &[]),
        }
    };
    let _ = events.send(Event::Lost(reason));
}

fn write_to_server(mut socket: TcpStream, lines: &Receiver<String>) {
    for line in lines {
        if socket.write_all(line.as_bytes()).is_err() {
            // Whoever reads from it learns why.
            let _ = socket.shutdown(Shutdown::Both);
            return;
        }
    }
}

/// Hands on what is typed: from a terminal as it comes, otherwise line by line. The end is empty.
fn listen_to_person(is_terminal: bool, typed: &SyncSender<Vec<u8>>, events: &SyncSender<Event>) {
    let mut input = io::stdin().lock();
    loop {
        let read = if is_terminal { read_keys(&mut input) } else { read_line(&mut input) };
        let bytes = match read {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // A terminal that is gone gives an error.
            read => read.unwrap_or_default(),
        };
        let is_end = bytes.is_empty();
        if typed.send(bytes).is_err() || events.send(Event::Typed).is_err() || is_end {
            return;
        }
    }
}

fn read_keys(input: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let bytes = input.fill_buf()?.to_vec();
    input.consume(bytes.len());
    Ok(bytes)
}

/// A line with its ending. Of one that is far too long to be sent only the beginning is kept, which
/// is too long as well.
fn read_line(input: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut rest = Vec::new();
    input.take(2 * MAX_LINE).read_until(b'\n', &mut line)?;
    let mut is_whole = line.ends_with(b"\n") || (line.len() as u64) < 2 * MAX_LINE;
    while !is_whole {
        rest.clear();
        let length = input.take(MAX_LINE).read_until(b'\n', &mut rest)?;
        is_whole = length == 0 || rest.ends_with(b"\n");
    }
    Ok(line)
}

// ---------------------------------------------------------------------------------------------
// The command line
// ---------------------------------------------------------------------------------------------

#[derive(Debug, PartialEq, Eq)]
struct Options {
    host: String,
    name: Option<String>,
    language: Language,
    has_colours: bool,
    rings: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Command {
    Run(Options),
    Show(String),
}

/// Reads the command line; an error is one sentence for standard error. `language` is what the
/// locale asks for.
fn parse_arguments(
    mut arguments: impl Iterator<Item = String>,
    language: Language,
) -> Result<Command, String> {
    let host = DEFAULT_HOST.to_owned();
    let mut options = Options { host, name: None, language, has_colours: true, rings: false };
    let mut words = 0;
    while let Some(argument) = arguments.next() {
        let value = argument.strip_prefix("--lang=").map(str::to_owned);
        match argument.as_str() {
            "--bell" => options.rings = true,
            "--no-color" => options.has_colours = false,
            _ if argument == "--lang" || value.is_some() => {
                let value = value.or_else(|| arguments.next()).unwrap_or_default();
                options.language = match value.as_str() {
                    "en" => Language::English,
                    "pt" => Language::Portuguese,
                    _ => return Err(language.say(text::NO_SUCH_LANGUAGE, &[&value])),
                };
            }
            "--help" | "-h" => {
                return Ok(Command::Show(options.language.say(text::USAGE, &[])));
            }
            "--version" | "-V" => {
                return Ok(Command::Show(format!(
                    "linechat-client {}\n",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            _ if argument.starts_with('-') => {
                return Err(language.say(text::NO_SUCH_OPTION, &[&argument]));
            }
            _ => {
                words += 1;
                match words {
                    1 => options.host = argument,
                    2 => options.name = Some(argument),
                    _ => return Err(language.say(text::TOO_MANY_WORDS, &[&argument])),
                }
            }
        }
    }
    Ok(Command::Run(options))
}

/// `HOST`, `HOST:PORT`, `[IPV6]:PORT` or a bare IPv6 address, completed by the default port.
fn with_port(host: &str) -> String {
    let is_bare_ipv6 = host.matches(':').count() > 1 && !host.starts_with('[');
    match host.rsplit_once(':') {
        _ if is_bare_ipv6 => format!("[{host}]:{DEFAULT_PORT}"),
        Some((_, port)) if !port.ends_with(']') => host.to_owned(),
        _ => format!("{host}:{DEFAULT_PORT}"),
    }
}

/// Connects to the first of the host's addresses that accepts. An error is the reason.
fn connect(address: &str, language: Language) -> Result<TcpStream, String> {
    let addresses = address.to_socket_addrs().map_err(|error| match error.kind() {
        ErrorKind::InvalidInput => error.to_string(),
        _ => language.say(text::NO_SUCH_HOST, &[]),
    })?;
    let mut reason = language.say(text::NO_SUCH_HOST, &[]);
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(socket) => return Ok(socket),
            Err(error) => reason = language.explain(&error),
        }
    }
    Err(reason)
}

/// Connects and talks. An error is what to say on standard error, line by line.
fn chat(options: Options) -> Result<(), Vec<String>> {
    let language = options.language;
    let address = with_port(&options.host);
    let cannot = |reason: &str| vec![language.say(text::CANNOT_CONNECT, &[&address, reason])];
    let refused = |error: io::Error| cannot(&error.to_string());
    let socket = connect(&address, language).map_err(|reason| cannot(&reason))?;
    socket.set_nodelay(true).map_err(refused)?;
    let (listening, writing) =
        (socket.try_clone().map_err(refused)?, socket.try_clone().map_err(refused)?);

    let (events, happened) = mpsc::sync_channel(EVENTS_AHEAD);
    let (keyboard, typed) = mpsc::sync_channel(1);
    let (out, lines) = mpsc::channel();
    let is_at_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let is_terminal = is_at_terminal && !is_dumb() && terminal::take_over(events.clone()).is_ok();
    let no_colour = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let screen = Screen::new(is_terminal, is_terminal && options.has_colours && !no_colour);

    let arrived = events.clone();
    thread::spawn(move || listen_to_server(listening, &arrived, language));
    thread::spawn(move || write_to_server(writing, &lines));
    thread::spawn(move || listen_to_person(is_terminal, &keyboard, &events));
    let mut client = Client::new(address, options, screen, out);
    let end = client.run(&happened, &typed);
    if is_terminal {
        terminal::give_back();
    }
    let mut complaints = client.unsent(&end);
    match end {
        End::Failed(reason) => complaints.insert(0, reason),
        End::Left if client.is_troubled && !is_at_terminal => {
            complaints.insert(0, language.say(text::SOME_NOT_TAKEN, &[]));
        }
        End::Left => {}
    }
    if complaints.is_empty() {
        Ok(())
    } else {
        Err(complaints)
    }
}

/// Whether the terminal understands no control sequences.
fn is_dumb() -> bool {
    match env::var("TERM") {
        Ok(kind) => kind.is_empty() || kind == "dumb",
        // Windows has no such variable.
        Err(_) => cfg!(unix),
    }
}

fn main() -> ExitCode {
    let complain = |text: &str| drop(writeln!(io::stderr(), "linechat-client: {text}"));
    let language = Language::of_the_locale(|variable| env::var(variable).ok());
    let arguments = env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    match parse_arguments(arguments, language) {
        Ok(Command::Show(text)) => match io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Ok(Command::Run(options)) => match chat(options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(complaints) => {
                complaints.iter().for_each(|text| complain(text));
                ExitCode::FAILURE
            }
        },
        Err(text) => {
            complain(&text);
            ExitCode::from(2)
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The terminal: the little that std lacks, and the only `unsafe`
// ---------------------------------------------------------------------------------------------

/// On Unix, what a terminal's settings look like in memory differs from system to system; stty(1)
/// knows, and its operands are POSIX's.
#[cfg(unix)]
#[allow(unsafe_code)]
mod terminal {
    use super::Event;
    use std::ffi::c_int;
    use std::io::{self, Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::process::{Command, Stdio};
    use std::sync::atomic::{AtomicI32, Ordering};
    use std::sync::mpsc::SyncSender;
    use std::sync::{Mutex, PoisonError};
    use std::thread;

    extern "C" {
        fn signal(number: c_int, handler: usize) -> usize;
        fn write(fd: c_int, bytes: *const u8, count: usize) -> isize;
    }

    /// The settings to give the terminal back with.
    static SETTINGS: Mutex<Option<String>> = Mutex::new(None);

    /// Takes the terminal over until `give_back`, which also happens when a signal ends the process
    /// or a thread panics. An event is sent when the window has another size.
    pub fn take_over(events: SyncSender<Event>) -> io::Result<()> {
        let settings = stty(&["-g"])?;
        *SETTINGS.lock().unwrap_or_else(PoisonError::into_inner) = Some(settings);
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            give_back();
            report(panic);
        }));
        watch_signals(events)?;
        // Keys as they are pressed and not line by line (-icanon), shown by us alone (-echo);
        // Ctrl-C and Ctrl-Z (-isig), Ctrl-V and Ctrl-O (-iexten), Ctrl-S and Ctrl-Q (-ixon) as keys
        // like others; at least one byte, whenever it comes.
        stty(&["-icanon", "-echo", "-isig", "-iexten", "-ixon", "min", "1", "time", "0"])
            .inspect_err(|_| give_back())?;
        // Pasted text comes between marks, so that its tabs are text.
        io::stdout().write_all(b"\x1b[?2004h")
    }

    /// Gives the terminal back as it was, without the line being typed.
    pub fn give_back() {
        let settings = SETTINGS.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(settings) = settings {
            let _ = stty(&[&settings]);
            let _ = io::stdout().write_all(b"\r\x1b[J\x1b[?7h\x1b[?2004l");
            let _ = io::stdout().flush();
        }
    }

    /// How many columns the window has.
    pub fn columns() -> usize {
        let size = stty(&["size"]).unwrap_or_default();
        let columns = size.split_whitespace().nth(1).and_then(|columns| columns.parse().ok());
        // A terminal that nobody told its size says 0.
        columns.filter(|&columns| columns > 0).unwrap_or(80)
    }

    /// Runs stty(1) on standard input. Returns what it prints.
    fn stty(arguments: &[&str]) -> io::Result<String> {
        let mut command = Command::new("stty");
        let command = command.args(arguments).stdin(Stdio::inherit()).stderr(Stdio::null());
        let output = command.output()?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(io::Error::other("stty failed")),
        }
    }

    // signal(7); these numbers are the same on Linux, macOS and the BSDs.
    const SIGHUP: c_int = 1;
    const SIGINT: c_int = 2;
    const SIGQUIT: c_int = 3;
    const SIGTERM: c_int = 15;
    const SIGWINCH: c_int = 28;
    const SIG_DFL: usize = 0;

    /// Where the signal handler writes the number of the signal.
    static SIGNALS: AtomicI32 = AtomicI32::new(-1);

    fn watch_signals(events: SyncSender<Event>) -> io::Result<()> {
        let (mut reader, writer) = UnixStream::pair()?;
        SIGNALS.store(writer.as_raw_fd(), Ordering::SeqCst);
        std::mem::forget(writer);
        for number in [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH] {
            // SAFETY: the handler only does what signal-safety(7) allows.
            unsafe { signal(number, on_signal as *const () as usize) };
        }
        thread::spawn(move || {
            let mut number = [0];
            while reader.read_exact(&mut number).is_ok() {
                let [number] = number;
                if c_int::from(number) == SIGWINCH {
                    let _ = events.send(Event::Resized);
                } else {
                    give_back();
                    // What a shell reports of a program that a signal has ended.
                    std::process::exit(128 + c_int::from(number));
                }
            }
        });
        Ok(())
    }

    extern "C" fn on_signal(number: c_int) {
        let byte = number as u8;
        // SAFETY: the descriptor stays open for ever; one byte is there to be written. A second
        // signal of those that end the process does so even if the terminal cannot be given back.
        unsafe {
            if number != SIGWINCH {
                signal(number, SIG_DFL);
            }
            write(SIGNALS.load(Ordering::SeqCst), &byte, 1);
        }
    }
}

/// On Windows, a console understands the same control sequences once it is asked to, and sends them
/// for its keys (SetConsoleMode, GetConsoleScreenBufferInfo; <consoleapi.h>, <wincon.h>).
#[cfg(windows)]
#[allow(unsafe_code)]
mod terminal {
    use super::Event;
    use std::io::{self, Write};
    use std::os::windows::io::{AsRawHandle, RawHandle};
    use std::sync::mpsc::SyncSender;
    use std::sync::{Mutex, PoisonError};
    use std::thread;
    use std::time::Duration;

    #[link(name = "kernel32")]
    extern "system" {
        fn GetConsoleMode(console: RawHandle, mode: *mut u32) -> i32;
        fn SetConsoleMode(console: RawHandle, mode: u32) -> i32;
        fn GetConsoleScreenBufferInfo(console: RawHandle, info: *mut ScreenBuffer) -> i32;
    }

    /// `CONSOLE_SCREEN_BUFFER_INFO`: three pairs and a rectangle of SHORTs, with a WORD between.
    #[repr(C)]
    #[derive(Default)]
    struct ScreenBuffer {
        size: [i16; 2],
        cursor: [i16; 2],
        attributes: u16,
        /// Left, top, right, bottom.
        window: [i16; 4],
        largest: [i16; 2],
    }

    // Of the input: keys one by one, not shown, Ctrl-C among them, and as control sequences.
    const ENABLE_PROCESSED_INPUT: u32 = 0x1;
    const ENABLE_LINE_INPUT: u32 = 0x2;
    const ENABLE_ECHO_INPUT: u32 = 0x4;
    const ENABLE_VIRTUAL_TERMINAL_INPUT: u32 = 0x200;
    // Of the output: control sequences are obeyed.
    const ENABLE_PROCESSED_OUTPUT: u32 = 0x1;
    const ENABLE_VIRTUAL_TERMINAL_PROCESSING: u32 = 0x4;

    /// How often the width is looked at, since no signal tells of its change.
    const GLANCE: Duration = Duration::from_millis(250);

    /// The modes of input and output to give the console back with.
    static MODES: Mutex<Option<(u32, u32)>> = Mutex::new(None);

    /// Takes the console over until `give_back`, which also happens when a thread panics. An event
    /// is sent when the window has another size.
    pub fn take_over(events: SyncSender<Event>) -> io::Result<()> {
        let (input, output) = (io::stdin().as_raw_handle(), io::stdout().as_raw_handle());
        let (keys, screen) = (mode_of(input)?, mode_of(output)?);
        *MODES.lock().unwrap_or_else(PoisonError::into_inner) = Some((keys, screen));
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            give_back();
            report(panic);
        }));
        let without = ENABLE_PROCESSED_INPUT | ENABLE_LINE_INPUT | ENABLE_ECHO_INPUT;
        let obeys = ENABLE_PROCESSED_OUTPUT | ENABLE_VIRTUAL_TERMINAL_PROCESSING;
        set_mode(input, keys & !without | ENABLE_VIRTUAL_TERMINAL_INPUT)
            .and_then(|()| set_mode(output, screen | obeys))
            .inspect_err(|_| give_back())?;
        thread::spawn(move || {
            let mut last = columns();
            loop {
                thread::sleep(GLANCE);
                if std::mem::replace(&mut last, columns()) != last
                    && events.send(Event::Resized).is_err()
                {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Gives the console back as it was, without the line being typed.
    pub fn give_back() {
        let modes = MODES.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((keys, screen)) = modes {
            let mut out = io::stdout();
            let _ = out.write_all(b"\r\x1b[J\x1b[?7h").and_then(|()| out.flush());
            let _ = set_mode(io::stdin().as_raw_handle(), keys);
            let _ = set_mode(out.as_raw_handle(), screen);
        }
    }

    /// How many columns the window has.
    pub fn columns() -> usize {
        let mut info = ScreenBuffer::default();
        // SAFETY: `info` is the structure that the call fills, and outlives it.
        let is_known =
            unsafe { GetConsoleScreenBufferInfo(io::stdout().as_raw_handle(), &mut info) } != 0;
        let [left, _, right, _] = info.window;
        let columns = usize::try_from(i32::from(right) - i32::from(left) + 1).ok();
        columns.filter(|&columns| is_known && columns > 0).unwrap_or(80)
    }

    fn mode_of(console: RawHandle) -> io::Result<u32> {
        let mut mode = 0;
        // SAFETY: `mode` outlives the call, which fills it.
        match unsafe { GetConsoleMode(console, &mut mode) } {
            0 => Err(io::Error::last_os_error()),
            _ => Ok(mode),
        }
    }

    fn set_mode(console: RawHandle, mode: u32) -> io::Result<()> {
        // SAFETY: takes no pointer but the handle, which is the process's own.
        match unsafe { SetConsoleMode(console, mode) } {
            0 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "conformance/linechat/client_tests.rs"]
mod tests;
