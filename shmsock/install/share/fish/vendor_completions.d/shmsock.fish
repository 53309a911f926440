# fish completion for shmsock: it is asked itself.
function __shmsock_complete
    set -l response (env _SHMSOCK_COMPLETE=fish_complete COMP_WORDS=(commandline -cp | string collect) \
        COMP_CWORD=(commandline -t | string collect) shmsock 2>/dev/null)
    for line in $response
        set -l found (string split --max 1 , -- $line)
        switch $found[1]
            case dir
                __fish_complete_directories $found[2]
            case file
                __fish_complete_path $found[2]
            case plain
                echo $found[2]
        end
    end
end
complete --no-files --command shmsock --arguments "(__shmsock_complete)"
