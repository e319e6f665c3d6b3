// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// What one peer may subscribe to.
const (
	maxTopics = 1024
	maxTopic  = 1 << 10 // bytes of one
)

// Pub sends each message to every subscriber whose topics begin its first frame. Safe for concurrent use.
type Pub struct {
	server

	hwm     int
	dropped atomic.Uint64

	subMu sync.Mutex // guards what follows
	subs  map[*subscriber]struct{}
}

// NewPub serves on ln, which it takes over. hwm is how many messages may wait for one slow subscriber; more are lost to
// it, and counted.
func NewPub(ln net.Listener, hwm int) *Pub {
	return newPubOf(ln, hwm, handshakeWait)
}

func newPubOf(ln net.Listener, hwm int, handshake time.Duration) *Pub {
	p := &Pub{hwm: hwm, subs: map[*subscriber]struct{}{}}
	p.start(ln, "PUB", []string{"SUB", "XSUB"}, handshake, p.subscribed)
	return p
}

// Send queues a message for those who subscribed to it. It never blocks, and keeps frames.
func (p *Pub) Send(frames ...[]byte) {
	topic := string(frames[0])
	p.subMu.Lock()
	defer p.subMu.Unlock()
	for s := range p.subs {
		if !s.offer(topic, frames, p.hwm) {
			p.dropped.Add(1)
		}
	}
}

// Dropped is how many messages were lost to slow subscribers, counted for each of them.
func (p *Pub) Dropped() uint64 { return p.dropped.Load() }

// Topics is how many subscriptions there are.
func (p *Pub) Topics() int {
	p.subMu.Lock()
	defer p.subMu.Unlock()
	n := 0
	for s := range p.subs {
		n += s.topicCount()
	}
	return n
}

// subscribed serves one peer: it reads its subscriptions here and writes to it on another goroutine.
func (p *Pub) subscribed(c *conn) {
	s := &subscriber{topics: map[string]int{}, wake: make(chan struct{}, 1), left: make(chan struct{})}
	p.subMu.Lock()
	p.subs[s] = struct{}{}
	p.subMu.Unlock()
	p.work.Go(func() { s.write(c) })
	for {
		frames, err := c.receive()
		if err != nil || !s.subscribe(frames) {
			break
		}
	}
	p.subMu.Lock()
	delete(p.subs, s)
	p.subMu.Unlock()
	close(s.left)
}

// subscriber is one peer of a Pub.
type subscriber struct {
	wake chan struct{} // holds one token while the queue is not empty
	left chan struct{} // closed when the peer is gone

	mu     sync.Mutex     // guards what follows
	topics map[string]int // subscriptions of each; as in libzmq, equal ones count
	queue  [][][]byte
}

// subscribe reads a subscription (1, topic) or its end (0, topic). It returns false when that is too long, or the peer has
// too many.
func (s *subscriber) subscribe(frames [][]byte) bool {
	if len(frames) != 1 || len(frames[0]) == 0 {
		return true // no business of a subscriber's; libzmq drops it
	}
	if len(frames[0]) > 1+maxTopic {
		return false
	}
	topic := string(frames[0][1:])
	s.mu.Lock()
	defer s.mu.Unlock()
	switch frames[0][0] {
	case 1:
		s.topics[topic]++
	case 0:
		if s.topics[topic]--; s.topics[topic] <= 0 {
			delete(s.topics, topic)
		}
	}
	return len(s.topics) <= maxTopics
}

// offer queues a message, if it is subscribed to; false when it is lost.
func (s *subscriber) offer(topic string, frames [][]byte, hwm int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.topics {
		if !strings.HasPrefix(topic, t) {
			continue
		}
		if len(s.queue) >= hwm {
			return false
		}
		s.queue = append(s.queue, frames)
		select {
		case s.wake <- struct{}{}:
		default:
		}
		break
	}
	return true
}

func (s *subscriber) topicCount() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.topics)
}

// write sends what is queued until the peer is gone.
func (s *subscriber) write(c *conn) {
	for {
		select {
		case <-s.left:
			return
		case <-s.wake:
		}
		for frames := s.next(); frames != nil; frames = s.next() {
			if c.send(frames) != nil {
				_ = c.Close() // ends the reading side
				return
			}
		}
	}
}

func (s *subscriber) next() (frames [][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return nil
	}
	frames, s.queue[0] = s.queue[0], nil
	s.queue = s.queue[1:]
	return frames
}
