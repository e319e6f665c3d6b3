// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/baton-epp/baton/inference"
)

// askForBlocks asks a vLLM to keep the blocks it computes and to answer with a handle on them. A real vLLM needs
// do_remote_decode alone; the nulls are what every router sends.
const askForBlocks = `{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}`

// nixlv2 is vLLM's NixlConnector, in pull and in push mode: serial, with a handle in kv_transfer_params.
type nixlv2 struct{}

func (nixlv2) Prefill(x *Exchange, body *inference.Edits) {
	OneToken(x.Request, body)
	setTransfer(x.Request, []byte(askForBlocks), body)
}

func (nixlv2) Decode(x *Exchange, handle []byte, body *inference.Edits) {
	setTransfer(x.Request, handle, body)
}

func (nixlv2) Withdraw(x *Exchange, body *inference.Edits) { clearTransfer(x.Request, body) }

// The members of a handle that are looked at, as indexes.
const (
	nixlPull = iota
	nixlEngineID
	nixlRequestID
	nixlHost
	nixlPort
	nixlBlockIDs
	nixlMode
	nixlTokens
	nixlMembers
)

// Answer takes the handle as it is. One with a member missing is not used: vLLM 0.32 answers a decode that lacks a
// field by ending its process, or hangs and ends it later (measured on vLLM 0.32).
func (nixlv2) Answer(x *Exchange, answer []byte) Answer {
	raw, _, err := inference.Field(answer, transferField)
	if err != nil {
		return Answer{Verdict: Malformed}
	}
	var scanner inference.UsageScanner
	scanner.Feed(answer)
	usage := scanner.Usage()
	a := Answer{PromptTokens: usage.PromptTokens, CachedTokens: -1}
	switch {
	case usage.FinishReason == "error":
		a.Verdict = Failed
		return a
	case len(raw) == 0 || raw[0] == 'n':
		a.Verdict = withoutHandle(x.Request, usage.FinishReason)
		return a
	case raw[0] != '{':
		a.Verdict = Incomplete
		return a
	}
	var found [nixlMembers]inference.Span
	members(raw, []string{
		"do_remote_prefill", "remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids",
		"transfer_mode", "remote_num_tokens",
	}, found[:])
	if tokens, err := strconv.ParseInt(text(raw, found[nixlTokens]), 10, 64); err == nil {
		a.PromptTokens = tokens
	}
	if !nixlComplete(raw, found) {
		a.Verdict = Incomplete
		return a
	}
	host := found[nixlHost]
	if x.RewriteHost && isLoopback(text(raw, host)) && !x.Prefiller.Addr.Addr().Unmap().IsLoopback() {
		addr := strconv.Quote(x.Prefiller.Addr.Addr().Unmap().WithZone("").String())
		a.Handle = slices.Concat(raw[:host.Start], []byte(addr), raw[host.End:])
		a.Rewritten = true
		return a
	}
	a.Handle = slices.Clone(raw)
	return a
}

// nixlComplete reports whether a decode engine can use the handle: it says that blocks are to be fetched, from whom, and
// which. In push mode the prefill engine knows which.
func nixlComplete(raw []byte, found [nixlMembers]inference.Span) bool {
	if text(raw, found[nixlPull]) != "true" {
		return false
	}
	for _, member := range []int{nixlEngineID, nixlRequestID, nixlHost} {
		if !startsWith(raw, found[member], '"') || found[member].Len() == len(`""`) {
			return false
		}
	}
	port, err := strconv.ParseUint(strings.Trim(text(raw, found[nixlPort]), `"`), 10, 16)
	if err != nil || port == 0 {
		return false
	}
	return areBlockIDs(text(raw, found[nixlBlockIDs])) || text(raw, found[nixlMode]) == `"push"`
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
	switch finish {
	case "stop", "end_turn", "stop_sequence", "tool_calls", "tool_use", "completed":
		return Complete
	}
	if r.MaxTokens == 1 {
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
