// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// What a peer may make this side keep or wait for.
const (
	maxBody       = 64 << 10 // bytes of one frame
	maxFrames     = 8        // of one message
	handshakeWait = 10 * time.Second
)

// Bits of a frame's first byte.
const (
	flagMore    = 1
	flagLong    = 2
	flagCommand = 4
)

const greetingBytes = 64

var (
	errGreeting = errors.New("not a ZMTP 3 greeting with the NULL mechanism")
	errReady    = errors.New("no READY command of a socket that goes with this one")
	errTooLarge = errors.New("frame too large or message too long")
	errFlags    = errors.New("frame with unknown flags")
)

// conn is a connection after its greeting. One goroutine receives; any may send.
type conn struct {
	net.Conn
	r *bufio.Reader

	sending sync.Mutex // a message at a time
}

// open shakes hands as a socket of type own with a peer of one of the types in peers, which may take wait.
func open(nc net.Conn, own string, peers []string, wait time.Duration) (*conn, error) {
	c := &conn{Conn: nc, r: bufio.NewReader(nc)}
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return nil, fmt.Errorf("handshake: %w", err)
	}
	greeting := make([]byte, greetingBytes)
	greeting[0], greeting[9], greeting[10] = 0xff, 0x7f, 3
	copy(greeting[12:], "NULL")
	if _, err := c.Write(greeting); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	theirs := make([]byte, greetingBytes)
	if _, err := io.ReadFull(c.r, theirs); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	if theirs[0] != 0xff || theirs[9]&1 == 0 || theirs[10] < 3 || string(bytes.TrimRight(theirs[12:32], "\x00")) != "NULL" {
		return nil, errGreeting
	}
	ready := property([]byte("\x05READY"), "Socket-Type", own)
	if err := c.sendCommand(property(ready, "Identity", "")); err != nil {
		return nil, fmt.Errorf("ready: %w", err)
	}
	flags, body, err := c.readFrame()
	if err != nil {
		return nil, fmt.Errorf("ready: %w", err)
	}
	if flags&flagCommand == 0 || !slices.Contains(peers, socketType(body)) {
		return nil, errReady
	}
	return c, c.SetDeadline(time.Time{})
}

// property appends one property of a READY command.
func property(dst []byte, name, value string) []byte {
	dst = append(dst, byte(len(name))) //nolint:gosec // own short texts
	dst = append(dst, name...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(value))) //nolint:gosec // own short texts
	return append(dst, value...)
}

// socketType is what a READY command says of its sender; "" when it says nothing that can be read.
func socketType(body []byte) string {
	rest, ok := bytes.CutPrefix(body, []byte("\x05READY"))
	for ok && len(rest) > 0 {
		n := 1 + int(rest[0])
		if len(rest) < n+4 {
			return ""
		}
		name, size := string(rest[1:n]), uint64(binary.BigEndian.Uint32(rest[n:]))
		if rest = rest[n+4:]; size > uint64(len(rest)) {
			return ""
		}
		if bytes.EqualFold([]byte(name), []byte("Socket-Type")) {
			return string(rest[:size])
		}
		rest = rest[size:]
	}
	return ""
}

// readFrame reads one frame, whose body it bounds before it makes room for it.
func (c *conn) readFrame() (flags byte, body []byte, err error) {
	if flags, err = c.r.ReadByte(); err != nil {
		return 0, nil, err //nolint:wrapcheck // the caller says what it was reading
	}
	if flags > flagMore|flagLong|flagCommand {
		return 0, nil, errFlags
	}
	size := make([]byte, 8)
	part := size[7:]
	if flags&flagLong != 0 {
		part = size
	}
	if _, err = io.ReadFull(c.r, part); err != nil {
		return 0, nil, err //nolint:wrapcheck // as above
	}
	n := binary.BigEndian.Uint64(size)
	if n > maxBody {
		return 0, nil, errTooLarge
	}
	body = make([]byte, n)
	_, err = io.ReadFull(c.r, body)
	return flags, body, err //nolint:wrapcheck // as above
}

// receive returns the next message. Commands in between are answered or passed over.
func (c *conn) receive() (frames [][]byte, err error) {
	for {
		flags, body, err := c.readFrame()
		if err != nil {
			return nil, fmt.Errorf("receive: %w", err)
		}
		if flags&flagCommand != 0 {
			if err := c.command(body); err != nil {
				return nil, err
			}
			continue
		}
		if frames = append(frames, body); flags&flagMore == 0 {
			return frames, nil
		}
		if len(frames) == maxFrames {
			return nil, errTooLarge
		}
	}
}

// command answers the heartbeat of ZMTP 3.1, which libzmq sends to peers of 3.0 too.
func (c *conn) command(body []byte) error {
	const ping, ttlBytes = "\x04PING", 2
	if rest, ok := bytes.CutPrefix(body, []byte(ping)); ok && len(rest) >= ttlBytes {
		return c.sendCommand(append([]byte("\x04PONG"), rest[ttlBytes:]...))
	}
	return nil
}

// send writes one message.
func (c *conn) send(frames [][]byte) error {
	size := 0
	for _, f := range frames {
		size += 9 + len(f)
	}
	out := make([]byte, 0, size)
	for i, f := range frames {
		flags := byte(flagMore)
		if i == len(frames)-1 {
			flags = 0
		}
		out = appendFrame(out, flags, f)
	}
	return c.write(out)
}

func (c *conn) sendCommand(body []byte) error { return c.write(appendFrame(nil, flagCommand, body)) }

func (c *conn) write(b []byte) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	if _, err := c.Write(b); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

func appendFrame(dst []byte, flags byte, body []byte) []byte {
	if len(body) > 255 {
		dst = binary.BigEndian.AppendUint64(append(dst, flags|flagLong), uint64(len(body)))
	} else {
		dst = append(dst, flags, byte(len(body))) //nolint:gosec // at most 255
	}
	return append(dst, body...)
}
