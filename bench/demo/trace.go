// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	tick         = 3 * time.Second // the trace's arrivals are rounded to it
	blockTokens  = 512             // prompt tokens that one hash id of the trace stands for
	tokenBytes   = 4               // of text, on average, for one token
	systemBlocks = 1               // leading blocks that are the system message: every prompt of the trace shares the first
)

// A record is one line of the trace.
type record struct {
	Timestamp    int64    `json:"timestamp"`     // ms
	InputLength  int      `json:"input_length"`  // tokens
	OutputLength int      `json:"output_length"` // tokens
	HashIDs      []uint64 `json:"hash_ids"`      // one per blockTokens
}

// A chat is one request to send.
type chat struct {
	ID        string        // X-Request-Id
	At        time.Duration // after the start
	System    string
	User      string
	MaxTokens int
}

// pace says how the trace becomes requests.
type pace struct {
	Divisor        int     // of prompt and answer lengths
	Speed          float64 // 2 sends twice as fast as the trace
	MaxPromptBytes int     // longer prompts are cut; 0 is no limit
}

func readTrace(path string) ([]record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	defer f.Close()
	var out []record
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var r record
		if err := json.Unmarshal(sc.Bytes(), &r); err != nil {
			return nil, fmt.Errorf("trace %s line %d: %w", path, len(out)+1, err)
		}
		out = append(out, r)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("trace %s: %w", path, err)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("trace %s is empty", path)
	}
	return out, nil
}

// plan turns the trace into requests, in order of arrival. The same pass gives the same requests; each further pass
// gives other texts, except for the block that all prompts share.
func plan(trace []record, p pace, pass int) []chat {
	rng := rand.New(rand.NewPCG(uint64(pass), 1)) //nolint:gosec // jitter, nothing secret; passes are few
	out := make([]chat, 0, len(trace))
	for _, r := range trace {
		at := time.Duration(r.Timestamp-trace[0].Timestamp)*time.Millisecond + time.Duration(rng.Int64N(int64(tick)))
		out = append(out, newChat(r, p, pass, at))
	}
	slices.SortFunc(out, func(a, b chat) int { return int(a.At - b.At) })
	for i := range out {
		out[i].ID = fmt.Sprintf("demo-%04d", pass*len(out)+i+1)
	}
	return out
}

func newChat(r record, p pace, pass int, at time.Duration) chat {
	per := blockTokens / p.Divisor * tokenBytes
	var text strings.Builder
	for i, id := range r.HashIDs {
		if i >= systemBlocks {
			id += uint64(pass) << 32 //nolint:gosec // passes are few
		}
		text.WriteString(blockText(id, per))
	}
	prompt := text.String()
	prompt = prompt[:min(len(prompt), max(r.InputLength/p.Divisor*tokenBytes, per))]
	if p.MaxPromptBytes > 0 {
		prompt = prompt[:min(len(prompt), p.MaxPromptBytes)]
	}
	system := prompt[:min(len(prompt), systemBlocks*per)]
	user := prompt[len(system):]
	if user == "" {
		user = "go on"
	}
	return chat{
		At:        time.Duration(float64(at) / p.Speed),
		System:    system,
		User:      user,
		MaxTokens: max(2, r.OutputLength/p.Divisor),
	}
}

// blockText returns n bytes of words, the same ones for the same id.
func blockText(id uint64, n int) string {
	rng := rand.New(rand.NewPCG(id, 2))
	var b strings.Builder
	for b.Len() < n {
		b.WriteString(vocabulary[rng.IntN(len(vocabulary))])
		b.WriteByte(' ')
	}
	return b.String()[:n]
}

var vocabulary = strings.Fields(`
	about after again along apple autumn balance basket before bench between bicycle bottle bread bridge bright
	candle carry castle chair change circle clear cloud coffee copper corner cotton country curtain dance danger
	daughter decide distant doctor dream early engine evening evidence family farmer finger flower follow forest
	forward friend garden gentle golden gravel harbor harvest heavy hidden history honest horse hundred island
	journey kitchen ladder language leather letter library lighter listen little market meadow measure member
	middle minute mirror moment morning mountain narrow nature needle notice number ocean office orange paper
	people pepper pencil picture planet pocket promise purple quarter quiet rabbit railway reason record remember
	ribbon river rocket runner sailor season second shadow shelter signal silver simple sister smooth soldier spoon
	spring station stone story street summer surface table thunder ticket timber toward travel uncle under valley
	velvet village violet wander water weather whistle window winter wonder yellow yesterday`)
