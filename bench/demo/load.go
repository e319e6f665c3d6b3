// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"sync"
	"time"
)

// settle bounds the wait for the requests that still run when no more are sent.
const settle = 30 * time.Second

// replay sends the requests at their times until sending ends or next has no more, then waits for those under way, until
// ctx ends and for a bounded time. What runs when ctx ends is stopped, not failed. It calls sent and done from several
// goroutines.
func replay(ctx, sending context.Context, c *client, next func() (chat, bool), sent func(chat), done func(result)) {
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	var all sync.WaitGroup
	started := time.Now()
	for {
		r, ok := next()
		if !ok || !wait(sending, time.Until(started.Add(r.At))) {
			break
		}
		sent(r)
		all.Go(func() {
			got := c.stream(running, r)
			got.Stopped = got.Err != nil && ctx.Err() != nil
			done(got)
		})
	}
	late := time.AfterFunc(settle, cancel)
	defer late.Stop()
	all.Wait()
}

// sequence yields the trace's requests, pass after pass when repeat is true.
func sequence(trace []record, p pace, repeat bool) func() (chat, bool) {
	var (
		chats      []chat
		pass       int
		begin, end time.Duration // of the present pass
	)
	return func() (chat, bool) {
		if len(chats) == 0 {
			if pass > 0 && !repeat {
				return chat{}, false
			}
			chats = plan(trace, p, pass)
			pass++
			begin, end = end, end+chats[len(chats)-1].At
		}
		r := chats[0]
		chats = chats[1:]
		r.At += begin
		return r, true
	}
}
