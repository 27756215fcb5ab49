-- Managed by Ansible (nvl.vllm.vllm_gateway).
-- When the health agent ejects an engine, cuts the requests there that have no byte of an answer, so that HAProxy sends
-- them to another engine.
--
-- HAProxy has something like it built in, "on-marked-down shutdown-sessions", which loses requests in three ways. It
-- cuts streams that run; a slow engine would have ended them, and the agent ends them itself when it restarts a hung
-- one. It cuts where only GET /health failed. And it cuts once, at the very moment, while requests are being connected;
-- those end without an answer, or wait for the hung engine. Here the engine is out first, and what waits there is cut
-- as often as needed.
--
-- After a reload the old processes go on with their requests, but check no engine any more. So this one cuts there,
-- too, through the master.
--
-- From 2.8 on HAProxy does not send again what is cut this way. There requests wait until the agent has restarted the
-- hung engine: its connections then end by themselves, and that HAProxy takes as a reason to send again.
local LAST_VERSION = 2.7
local MASTER = "unix@" .. os.getenv("VLLM_GATEWAY_MASTER")
local BACKEND = "engines"
local TIMEOUT_S = 5
-- As long as requests are found, and while the engine stays out.
local AGAIN_MS, LATER_MS = 200, 1000

-- Lines of an answer, which ends with an empty one.
local function ask(command)
    local socket, lines = core.tcp(), {}
    socket:settimeout(TIMEOUT_S)
    local line = socket:connect(MASTER) and socket:send(command .. "\n") and socket:receive("*l")
    if not line then
        core.Warning("eject.lua: no answer to " .. command)
    end
    while line and line ~= "" do
        table.insert(lines, line)
        line = socket:receive("*l")
    end
    socket:close()
    return lines
end

-- Whether an engine has a request in full and has not answered with a byte.
local function unanswered(process, stream)
    local silent, state
    for _, line in ipairs(ask("@!" .. process .. " show sess " .. stream)) do
        silent = silent or line:find("rsp.st=MSG_RPBEFORE", 1, true)
        -- The client's side comes first ("scf", or "si[0]" before 2.6), the engine's second, which stays.
        state = line:match("^  s[ci].*state=(%u+)") or state
    end
    return silent and state == "EST"
end

local function cut(engine)
    local count = 0
    for _, line in ipairs(ask("show proc")) do
        local process = line:match("^(%d+)%s+worker")
        for _, session in ipairs(process and ask("@!" .. process .. " show sess") or {}) do
            local stream, backend, server = session:match("^(0x%x+): .* be=(%S+) srv=(%S+) ")
            if backend == BACKEND and server == engine and unanswered(process, stream) then
                ask("@!" .. process .. " shutdown session " .. stream)
                count = count + 1
            end
        end
    end
    if count > 0 then
        core.Info("eject.lua: " .. engine .. " is ejected: " .. count .. " requests move on")
    end
    return count
end

core.register_task(function()
    if tonumber(core.get_info()["Version"]:match("^%d+%.%d+")) > LAST_VERSION then
        return
    end
    -- A process that was told to end sees no engine change any more.
    while core.get_info()["Stopping"] == 0 do
        local count = 0
        for name, server in pairs(core.backends[BACKEND].servers) do
            if server:get_stats()["status"] == "DOWN (agent)" then
                count = count + cut(name)
            end
        end
        core.msleep(count > 0 and AGAIN_MS or LATER_MS)
    end
end)
