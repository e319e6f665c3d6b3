// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"fmt"
	"strconv"
	"sync"
)

// rooms are where the two legs of SGLang's requests meet. They belong to one prefill process, and are gone with it.
// Safe for concurrent use.
type rooms struct {
	mu   sync.Mutex
	open map[int64]*room
}

// room joins the legs of one sequence. A leg that has left cannot come back: the other one waits in vain.
type room struct {
	number int64
	joined chan struct{} // closed when the decode leg has blocks to write to
	ready  chan struct{} // closed when the prefill leg's blocks are filled
	taken  chan struct{} // closed when they were copied

	// Guarded by rooms.mu.
	prefill, decode partyState
	blocks          []int64       // of the prefill engine, once ready
	copying         chan struct{} // closed when a copy that runs has ended; nil for none
}

// partyState is how far one leg has come in its room.
type partyState int

const (
	partyAbsent partyState = iota
	partyHere
	partyGone
)

// duplicateError says that a leg found another of its kind in its room.
type duplicateError struct{ room int64 }

func (d *duplicateError) Error() string {
	return fmt.Sprintf("KVTransferError(bootstrap_room=%d): room is in use", d.room)
}

// enter brings a leg in, the prefill leg or the decode leg, whichever comes first.
func (r *rooms) enter(number int64, prefill bool) (*room, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.open[number]
	if m == nil {
		m = &room{number: number, joined: make(chan struct{}), ready: make(chan struct{}), taken: make(chan struct{})}
	}
	mine := m.party(prefill)
	if *mine != partyAbsent {
		return nil, &duplicateError{number}
	}
	*mine = partyHere
	if !prefill {
		close(m.joined)
	}
	r.open[number] = m
	return m, nil
}

// name is the room in records.
func (m *room) name() string { return strconv.FormatInt(m.number, 10) }

func (m *room) party(prefill bool) *partyState {
	if prefill {
		return &m.prefill
	}
	return &m.decode
}

// leave takes a leg out. The room stays while the other leg is in it. A prefill leg waits for a copy that runs, since its
// blocks are free afterwards.
func (r *rooms) leave(m *room, prefill bool) {
	r.mu.Lock()
	*m.party(prefill) = partyGone
	if m.prefill != partyHere && m.decode != partyHere && r.open[m.number] == m {
		delete(r.open, m.number)
	}
	copying := m.copying
	r.mu.Unlock()
	if prefill && copying != nil {
		<-copying
	}
}

// fill says which blocks the prefill leg offers.
func (r *rooms) fill(m *room, blocks []int32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, b := range blocks {
		m.blocks = append(m.blocks, int64(b))
	}
	close(m.ready)
}

// take begins to copy; ok is false when the prefill leg has left. done must be called at the end of the copy.
func (r *rooms) take(m *room) (blocks []int64, done func(copied bool), ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m.prefill != partyHere {
		return nil, nil, false
	}
	copying := make(chan struct{})
	m.copying = copying
	return m.blocks, func(copied bool) {
		if copied {
			close(m.taken)
		}
		close(copying)
	}, true
}

// count is the number of open rooms.
func (r *rooms) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.open)
}
