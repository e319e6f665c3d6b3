// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/baton-epp/baton/inference"
)

// The members that handles of all of vLLM's pulling connectors have, as indexes; a [handleForm] puts its own behind
// them.
const (
	handlePull = iota
	handleEngineID
	handleHost
	handleBlockIDs
	handleMode
	handleTokens
	handleCached
	handleOwn
)

// A handleForm says which members of its own a handle has in kv_transfer_params, and without which decode would hang
// or die. Any other member is copied unseen.
type handleForm []struct {
	name string
	ok   func(value string) bool
}

// take makes the handle out of a prefill's answer: the bytes as they are, but for a loopback host where x allows it.
// A handle with a member missing is not used: vLLM 0.32 answers a decode that lacks a field by ending its process, or
// hangs and ends it later (measured on vLLM 0.32).
func (form handleForm) take(x *Exchange, answer []byte) Answer {
	r, settled := read(answer)
	if settled {
		return r.Answer
	}
	raw := r.member(answerTransfer)
	switch {
	case !isThere(raw):
		r.Verdict = withoutHandle(x.Request, r.finish)
		return r.Answer
	case raw[0] != '{':
		r.Verdict = Incomplete
		return r.Answer
	}
	names := []string{
		"do_remote_prefill", "remote_engine_id", "remote_host", "remote_block_ids", "transfer_mode",
		"remote_num_tokens", "remote_prefill_cached_tokens",
	}
	for _, own := range form {
		names = append(names, own.name)
	}
	found := make([]inference.Span, len(names))
	members(raw, names, found)
	if n := natural(text(raw, found[handleTokens])); n >= 0 {
		r.PromptTokens = n
	}
	if n := natural(text(raw, found[handleCached])); n >= 0 {
		r.CachedTokens = n
	}
	if !form.complete(raw, found) || !json.Valid(raw) { // Python's NaN is no JSON
		r.Verdict = Incomplete
		return r.Answer
	}
	host := found[handleHost]
	if x.RewriteHost && isLoopback(text(raw, host)) && !x.Prefiller.Addr.Addr().Unmap().IsLoopback() {
		addr := strconv.Quote(hostOf(x.Prefiller))
		r.Handle = slices.Concat(raw[:host.Start], []byte(addr), raw[host.End:])
		r.Rewritten = true
		return r.Answer
	}
	r.Handle = slices.Clone(raw)
	return r.Answer
}

// complete reports whether a decode engine can use the handle: it says that blocks are to be fetched, from whom, and
// which. In push mode the prefill engine knows which.
func (form handleForm) complete(raw []byte, found []inference.Span) bool {
	if text(raw, found[handlePull]) != "true" || !isText(text(raw, found[handleEngineID])) || !isText(text(raw, found[handleHost])) {
		return false
	}
	for i, value := range found[handleOwn:] {
		if !form[i].ok(text(raw, value)) {
			return false
		}
	}
	return areBlockIDs(text(raw, found[handleBlockIDs])) || text(raw, found[handleMode]) == `"push"`
}

// isText reports whether a JSON value is a string that is not empty.
func isText(value string) bool { return len(value) > len(`""`) && value[0] == '"' }

// isPort reports whether a JSON value is a port, as a number or in a string.
func isPort(value string) bool {
	n, err := strconv.ParseUint(strings.Trim(value, `"`), 10, 16)
	return err == nil && n != 0
}

// areBlockIDs reports whether a JSON value is an array of numbers (older engines) or of arrays of them, one for each
// group of KV caches; anything else in it, such as null, ends the decode engine. An empty array is legal: decode pulls
// nothing, and tells the prefill engine to free what it holds (vLLM NixlConnector).
func areBlockIDs(value string) bool {
	const allowed = "[]0123456789, \t\r\n"
	return strings.HasPrefix(value, "[") &&
		!strings.ContainsFunc(value, func(r rune) bool { return !strings.ContainsRune(allowed, r) })
}

// withoutHandle tells an answer that needs no handle from one that should have had it. Older vLLM hold blocks only
// for an answer cut off by its limit: one that stopped by itself carries no handle.
func withoutHandle(r *inference.Request, finish string) Verdict {
	if endedByItself(finish) || r.MaxTokens == 1 {
		return Complete
	}
	return Missing
}

// isLoopback reports whether a JSON string names the host it is read on.
func isLoopback(quoted string) bool {
	name := strings.ToLower(strings.Trim(quoted, `"`))
	if name == "localhost" || strings.HasSuffix(name, ".localhost") || strings.HasPrefix(name, "localhost.") {
		return true
	}
	addr, err := netip.ParseAddr(name)
	return err == nil && (addr.Unmap().IsLoopback() || addr.IsUnspecified())
}
